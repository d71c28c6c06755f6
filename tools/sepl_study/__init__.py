"""Parts of sepl_evidence.py: scenes and masks, what is measured on them, tables and pictures."""
