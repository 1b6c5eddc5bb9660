"""The LoRA in the formats that others read."""
