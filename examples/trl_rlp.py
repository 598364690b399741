"""RLP with TRL's trainer, as a script of TRL's: flags or YAML, LoRA by --use_peft, plain text in.

    python -m examples.trl_rlp --model_name_or_path Qwen/Qwen3-0.6B-Base --dataset_name docs.jsonl \\
        --output_dir runs/trl \\
        --positions after --marker "=" --max_steps 100 --num_generations 8 --per_device_train_batch_size 8
    accelerate launch -m examples.trl_rlp --config rlp.yaml
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rlpretrain.trl import RLPConfig, RLPTrainer


def main(argv: Sequence[str] | None = None) -> None:
    """Train and save."""
    from datasets import load_dataset
    from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config

    parser = TrlParser((ScriptArguments, RLPConfig, ModelConfig))
    script, args, model = parser.parse_args_and_config(None if argv is None else list(argv))
    args.model_init_kwargs = {
        "revision": model.model_revision,
        "dtype": model.dtype or "float32",
        "attn_implementation": model.attn_implementation,
    }
    file = Path(script.dataset_name)
    if file.is_file():
        kind = {".txt": "text", ".jsonl": "json"}.get(file.suffix, file.suffix.removeprefix("."))
        data = load_dataset(kind, data_files=str(file), split="train")
    else:
        data = load_dataset(
            script.dataset_name,
            script.dataset_config,
            split=script.dataset_train_split,
            streaming=script.dataset_streaming,
        )
    trainer = RLPTrainer(
        model.model_name_or_path, args=args, train_dataset=data, peft_config=get_peft_config(model)
    )
    trainer.train()
    trainer.save_model(args.output_dir)


if __name__ == "__main__":
    main()
