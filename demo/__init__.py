"""A complete run on generated problems: base model, PoLAR and LoRA under ZeRO-3, export, scores, report."""
