"""sambay-sft: staged supervised fine-tuning of hybrid SSM/attention reasoning models."""

__version__ = "0.1.0"
