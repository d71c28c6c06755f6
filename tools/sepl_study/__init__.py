"""Parts of sepl_evidence.py: scenes and masks, refiners of instances, tables and pictures."""
