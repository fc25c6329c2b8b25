"""Cross entropy of a linear projection (a language model's head) without its full logits."""
