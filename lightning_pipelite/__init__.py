"""Pipeline-parallel fine-tuning of Hugging Face causal LMs inside the Lightning Trainer."""
