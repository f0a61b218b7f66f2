"""Named combinations of the literature. A preset is one line that expands to an expression."""

PRESETS: dict[str, str] = {
    # QLoRA (2023): 4-bit frozen weights, LoRA on every linear
    "qlora": "nf4 + lora(rank=64, alpha=16, dropout=0.05)",
    # LLM.int8() (2022), of the weights alone: 8 bits, one symmetric grid for each output
    "int8": "rtn(bits=8, group=0, symmetric=True)",
    # Quantized Side Tuning (2024): a ladder beside a 4-bit backbone, a gate for each channel
    "qst": "nf4 + lst(reduction=16, down='low_rank', gate='channel')",
    # MAM adapter (2022): prefix in attention, scaled parallel adapter on the feed-forward part
    "mam": "prefix(length=30) + parallel(bottleneck=512, scale=4.0)",
    # AdaptFormer (2022): beside the MLP of every block, reading the residual stream before its norm
    "adaptformer": "parallel(bottleneck=64, scale=0.1, dropout=0.1, tap='residual')",
    # P-Tuning v2 (2022): rows before keys and values, dropped at random, and a linear head
    "p_tuning_v2": "prefix(length=20, dropout=0.1)",
    # CoCoOp (2022): a context before the names of classes that follows the image
    "cocoop": "coop(length=4, hidden=32)",
    # MMRL++ (2025): aligners that share a matrix, rows mixed with what a block made of them
    "mmrl_pp": "mmrl(rank=4, proj_rank=64, beta=0.9)",
    # MAD-X (2020): a language adapter, at the token table and behind every MLP
    "mad_x": "invertible + pfeiffer(reduction=16)",
    # GradNormLoRP (2025): lengths of rows and a low-rank direction, whose factors' gradients are
    # projected on both sides; 0.25 in pre-training
    "gradnormlorp": "dora(rank=8, alpha=16.0, hold_norm=False) + galore(rank=4, every=250, "
                    "scale=4.0, proj_type='full')",
    # MHR (2022): Poly whose skills are weighed slice by slice
    "mhr": "poly(slices=8)",
    # QZO (2025): two forwards a step, and only the scales of 4-bit codes move
    "qzo": "nf4 + peqa(group=64) + mezo(g_max=100.0)",
    # S2A (2025): biases, prompts and branches at a lower resolution in every block (0.86 % of a
    # ViT-B; sizes are a best reading), and what backward keeps in a few bits by what it is for
    "s2a": "bitfit + vpt(length=20, deep=True) + lite_residual(bottleneck=24) + "
           "coded(softmax_bits=4)",
    # LOMO (2023) and AdaLomo (2023): each tensor is stepped, and its gradient freed, in backward
    "lomo": "full + sgd + step_in_backward",
    "adalomo": "full + adafactor(scale_parameter=True) + step_in_backward",
}
