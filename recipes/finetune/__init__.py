"""Fine-tuning a timm backbone and exporting it as plain timm weights."""
