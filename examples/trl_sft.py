"""What `trl sft` does, under the guard: python trl_sft.py --model_name_or_path M --dataset_name D --output_dir OUT"""

from datasets import load_dataset
from trl import ModelConfig, ScriptArguments, SFTConfig, SFTTrainer, TrlParser, get_peft_config

from qkguard import QKGuardCallback

script, args, model = TrlParser((ScriptArguments, SFTConfig, ModelConfig)).parse_args_and_config()
rows = load_dataset(script.dataset_name, name=script.dataset_config, split=script.dataset_train_split)
guard, lora = QKGuardCallback(), get_peft_config(model)
trainer = SFTTrainer(model.model_name_or_path, args, train_dataset=rows, peft_config=lora, callbacks=[guard])
trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
trainer.save_model()
