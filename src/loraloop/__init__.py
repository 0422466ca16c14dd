"""loraloop: recorded episodes of LLM agents in, LoRA adapters that are proven better out."""
