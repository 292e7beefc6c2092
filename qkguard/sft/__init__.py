"""`qkguard sft`: from one YAML to a training with model, data, TRL's SFTConfig and the guard.

May import `training` and the rooms below it. Public: `arguments.parse`, `plan.plan`, `preflight.preflight`,
`launch.launch_command`, `train.train`.
"""
