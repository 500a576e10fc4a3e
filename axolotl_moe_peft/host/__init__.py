"""What knows Axolotl: the plugin, its YAML blocks and their checks, its callback, its sub-commands."""
