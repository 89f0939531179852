"""Tiny random pipelines as `diffusers` saves them, for tests that compare with its pipeline classes."""

import diffusers
import torch

WAN = {
    "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "text_dim": 12,
    "freq_dim": 16, "ffn_dim": 40, "num_layers": 2,
}  # fmt: skip
WAN_VAE = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1,
           "latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [1.0, 2.0, 1.5, 0.7]}  # fmt: skip
WORDS = ("<pad>", "</s>", "<unk>", "a", "red", "circle", "moves", "left", "blurry", "grey")


def randomise(model, seed=0):
    """Every parameter random and of a size that keeps the outputs of order one."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3 if parameter.ndim < 2 else 0.8 / parameter[0].numel() ** 0.5)
    return model.eval()


def tokenizer(max_tokens=512):
    """A tokenizer of ten words, which ends a caption with </s> as T5's do."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=max_tokens
    )


def umt5(width=12):
    """A text encoder of one layer."""
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(d_model=width, d_kv=4, d_ff=16, num_layers=1, num_heads=2, vocab_size=len(WORDS))
    return randomise(UMT5EncoderModel(config))


def wan_pipeline(scheduler, **config):
    """A whole WanPipeline."""
    return diffusers.WanPipeline(
        tokenizer=tokenizer(),
        text_encoder=umt5(),
        vae=randomise(diffusers.AutoencoderKLWan(**WAN_VAE)),
        scheduler=scheduler,
        transformer=randomise(diffusers.WanTransformer3DModel(**WAN | config)),
    )
