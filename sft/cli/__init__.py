"""The `sft` command: one file per verb, imported when that verb runs."""
