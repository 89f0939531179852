"""Tiny random pipelines as `diffusers` saves them, for tests that compare with its pipeline classes."""

import diffusers
import torch

from tests.parity import tiny_texts

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


def wan_pipeline(scheduler, low_noise=False, **config):
    """A whole WanPipeline, on demand with a second transformer for low noise."""
    made = [randomise(diffusers.WanTransformer3DModel(**WAN | config), seed) for seed in range(1 + low_noise)]
    return diffusers.WanPipeline(
        tokenizer=tokenizer(),
        text_encoder=umt5(),
        vae=randomise(diffusers.AutoencoderKLWan(**WAN_VAE)),
        scheduler=scheduler,
        transformer=made[0],
        transformer_2=made[1] if low_noise else None,
        boundary_ratio=0.875 if low_noise else None,
    )


HUNYUAN = {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "num_layers": 1,
           "num_single_layers": 1, "text_embed_dim": 16, "pooled_projection_dim": 8,
           "rope_axes_dim": (4, 4, 4)}  # fmt: skip
HUNYUAN_VAE = {"latent_channels": 4, "block_out_channels": (8, 16, 24, 24), "layers_per_block": 1, "norm_num_groups": 4}


def hunyuan_pipeline(scheduler, **config):
    """A whole HunyuanVideoPipeline."""
    (llama, words), (clip, letters) = tiny_texts.llama(), tiny_texts.clip()
    return diffusers.HunyuanVideoPipeline(
        text_encoder=llama, tokenizer=words, text_encoder_2=clip, tokenizer_2=letters,
        vae=randomise(diffusers.AutoencoderKLHunyuanVideo(**HUNYUAN_VAE)),
        scheduler=scheduler,
        transformer=randomise(diffusers.HunyuanVideoTransformer3DModel(**HUNYUAN | config)),
    )  # fmt: skip


LTX = {"num_attention_heads": 2, "attention_head_dim": 20, "in_channels": 6, "out_channels": 6,
       "cross_attention_dim": 40, "num_layers": 2, "caption_channels": 12}  # fmt: skip
LTX_VAE = {"latent_channels": 6, "block_out_channels": (8, 8, 8, 8), "decoder_block_out_channels": (8, 8, 8, 8),
           "layers_per_block": (1, 1, 1, 1, 1), "decoder_layers_per_block": (1, 1, 1, 1, 1)}  # fmt: skip


def ltx_pipeline(scheduler, **config):
    """A whole LTXPipeline."""
    encoder, words = tiny_texts.t5()
    return diffusers.LTXPipeline(
        text_encoder=encoder, tokenizer=words, vae=randomise(diffusers.AutoencoderKLLTXVideo(**LTX_VAE)),
        scheduler=scheduler, transformer=randomise(diffusers.LTXVideoTransformer3DModel(**LTX | config)),
    )  # fmt: skip


COGVIDEOX = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4,
             "time_embed_dim": 14, "text_embed_dim": 12, "num_layers": 2, "sample_width": 6, "sample_height": 4,
             "sample_frames": 5, "use_rotary_positional_embeddings": True}  # fmt: skip
COGVIDEOX_VAE = {
    "latent_channels": 4,
    "block_out_channels": (8, 8, 8, 8),
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "down_block_types": ("CogVideoXDownBlock3D",) * 4,
    "up_block_types": ("CogVideoXUpBlock3D",) * 4,
}


def cogvideox_pipeline(scheduler, **config):
    """A whole CogVideoXPipeline."""
    encoder, words = tiny_texts.t5()
    return diffusers.CogVideoXPipeline(
        text_encoder=encoder, tokenizer=words, vae=randomise(diffusers.AutoencoderKLCogVideoX(**COGVIDEOX_VAE)),
        scheduler=scheduler, transformer=randomise(diffusers.CogVideoXTransformer3DModel(**COGVIDEOX | config)),
    )  # fmt: skip


LATTE = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 2,
    "cross_attention_dim": 32,
    "attention_bias": True,
    "sample_size": 10,
    "patch_size": 2,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000,
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "caption_channels": 12,
    "video_length": 3,  # the reference takes clips of no other length
}  # fmt: skip
IMAGE_VAE = {"latent_channels": 4, "block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 2,
             "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}  # fmt: skip


def latte_pipeline(scheduler, **config):
    """A whole LattePipeline."""
    encoder, words = tiny_texts.t5()
    return diffusers.LattePipeline(
        text_encoder=encoder, tokenizer=words, vae=randomise(diffusers.AutoencoderKL(**IMAGE_VAE)),
        scheduler=scheduler, transformer=randomise(diffusers.LatteTransformer3DModel(**LATTE | config)),
    )  # fmt: skip
