"""From recipe to training: one YAML for model, data, TRL's SFTConfig and the guard (`qkguard sft`)."""
