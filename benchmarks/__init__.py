"""Speed of a training step beside plain fine-tuning and other distillers, and of its parts beside loop references."""
