"""Pretraining and fine-tuning of medmim's encoders; a user of weights never imports it."""
