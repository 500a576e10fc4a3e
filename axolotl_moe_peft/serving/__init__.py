"""Serving adapters by other engines than PEFT."""
