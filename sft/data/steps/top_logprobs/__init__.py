"""The step `top_logprobs`."""
