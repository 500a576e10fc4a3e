"""Registers Axolotl's plugin for distillation before the training arguments are imported, to which it adds its own."""

from axolotl.integrations.base import PluginManager

PluginManager.get_instance().register("axolotl.integrations.kd.KDPlugin")
