"""Unchanged models of transformers, small and random, by attn_implementation="numformer"."""
import importlib

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
numformer = pytest.importorskip("numformer")
pytest.importorskip("numformer.torch")

SMALL = {"vocab_size": 61, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 60}
DECODER = SMALL | {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
                   "num_key_value_heads": 2, "max_position_embeddings": 64}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**DECODER),
    "mistral": lambda: transformers.MistralConfig(**DECODER, sliding_window=5),
    "qwen2": lambda: transformers.Qwen2Config(**DECODER, use_sliding_window=True, sliding_window=6,
                                              max_window_layers=1),
    "gpt2": lambda: transformers.GPT2Config(**SMALL, n_embd=32, n_layer=2, n_head=4, n_positions=64, attn_pdrop=0.0,
                                            embd_pdrop=0.0, resid_pdrop=0.0),
    "gemma2": lambda: transformers.Gemma2Config(**DECODER, head_dim=8, sliding_window=5, attn_logit_softcapping=2.0),
    "gpt_oss": lambda: transformers.GptOssConfig(
        **DECODER, head_dim=8, sliding_window=5, num_local_experts=2, num_experts_per_tok=1,
        layer_types=["sliding_attention", "full_attention"]),
}


def models(name, *implementations):
    """The same weights under each implementation."""
    made = []
    for implementation in implementations:
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation=implementation)
        made.append(model.eval())
    for model in made[1:]:
        model.load_state_dict(made[0].state_dict())
    return made


def agree(run, other):
    """What ``run(implementation)`` gives with numformer's attention and with another's, of the same weights."""
    results = []
    for implementation in ("numformer", other):
        torch.manual_seed(0)
        results.append(run(implementation))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def batch():
    tokens = torch.randint(2, 60, (3, 12), generator=torch.Generator().manual_seed(1))
    padding = torch.ones_like(tokens)
    padding[1, :4] = 0          # on the left, as in generation
    padding[2, 9:] = 0          # on the right, as in training
    return tokens, padding


def padded_on(side, tokens, second, third):
    """A mask with so much padding in the second and the third row."""
    padding = torch.ones_like(tokens)
    padding[1, :second] = padding[2, :third] = 0
    return padding if side == "left" else padding.flip(1)


def reference(name):
    return "eager" if name in ("gemma2", "gpt_oss") else "sdpa"     # sdpa has neither softcap nor sinks


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_every_gradient_are_those_of_the_reference(name, padded):
    tokens, padding = batch()
    padding = padding if padded else None
    labels = tokens.clone()
    if padded:      # what stands after a token of padding is foretold from a row that sees nothing
        labels[padding == 0] = -100
        labels[:, 1:][padding[:, :-1] == 0] = -100
    real = torch.ones_like(tokens, dtype=torch.bool) if padding is None else padding.bool()
    results = []
    for model in models(name, "numformer", reference(name)):
        result = model(tokens, attention_mask=padding, labels=labels)
        result.loss.backward()
        results.append([result.logits[real], result.loss, *(p.grad for p in model.parameters())])
    assert len(results[0]) > 10
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_three_steps_of_training_are_those_of_the_reference(name):
    tokens, _ = batch()
    losses = []
    for model in models(name, "numformer", reference(name)):
        optimizer = torch.optim.SGD(model.train().parameters(), lr=0.5)
        losses.append([])
        for _ in range(3):
            loss = model(tokens, labels=tokens).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0][2] < losses[0][0] and losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.filterwarnings("ignore:A decoder-only architecture is being used")
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", CONFIGS)
def test_generation_of_a_padded_batch_is_that_of_eager_token_for_token(name, side, cache):
    tokens, _ = batch()
    padding = padded_on(side, tokens, 4, 2)     # on the right, a new token sees the prompt on the far side of it
    ours, theirs = (
        model.generate(tokens, attention_mask=padding, max_new_tokens=12, do_sample=False, cache_implementation=cache,
                       disable_compile=True)
        for model in models(name, "numformer", "eager"))
    assert ours.shape[1] > 12 and torch.equal(ours, theirs)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_padded_batch_trains_as_by_eager_and_no_mask_of_queries_times_keys_is_made(name, side, monkeypatch):
    tokens, _ = batch()
    padding = padded_on(side, tokens, 4, 9)
    positions = (padding.cumsum(1) - 1).clamp(min=0)
    labels = tokens.masked_fill(padding == 0, -100)
    labels[:, 1:][padding[:, :-1] == 0] = -100
    masks, results = [], []
    made = numformer.torch.scaled_dot_product_attention

    def watched(*arguments, **keywords):
        masks.append(arguments[3])
        return made(*arguments, **keywords)

    monkeypatch.setattr(numformer.torch, "scaled_dot_product_attention", watched)
    for model in models(name, "numformer", "eager"):
        result = model.train()(tokens, attention_mask=padding, position_ids=positions, labels=labels)
        result.loss.backward()
        results.append([result.logits[padding.bool()], result.loss, *(p.grad for p in model.parameters())])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert len(masks) == 2 and all(mask.shape == (3, 1, 1, 12) for mask in masks)


@pytest.mark.filterwarnings("ignore")         # of torch about itself
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_a_compiled_model_gives_the_logits_and_gradients_of_the_plain_one(name):
    tokens, padding = batch()
    model, = models(name, "numformer")
    torch.compiler.reset()
    results = []
    for f in (model, torch.compile(model, backend="eager")):
        model.zero_grad()
        logits = f(tokens, attention_mask=padding).logits[padding.bool()]
        logits.square().sum().backward()
        results.append([logits, *(p.grad.clone() for p in model.parameters())])
    for plain, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-4)


def test_rules_of_other_kinds_get_the_mask_of_sdpa():
    from transformers import masking_utils

    rule = masking_utils.chunked_causal_mask_function(3, torch.zeros(2, dtype=torch.int64))
    mask = numformer.torch.mask_of_transformers(2, 7, 7, mask_function=rule, attention_mask=batch()[1][:2, :7].bool())
    assert mask.shape == (2, 1, 7, 7) and not mask[0, 0, 3, 2] and mask[0, 0, 4, 3]


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("window", [None, 5])
def test_a_model_that_goes_by_the_elements_of_its_masks(window, cache):
    tokens, padding = batch()
    padding = padded_on("left", tokens, 4, 2)
    results = []
    for implementation in ("numformer", "eager"):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.DogeConfig(**DECODER, sliding_window=window), attn_implementation=implementation).eval()
        results.append([*(model(tokens, attention_mask=mask).logits[padding.bool()] for mask in (padding, None)),
                        model.generate(tokens, attention_mask=padding, max_new_tokens=8, do_sample=False,
                                       cache_implementation=cache, disable_compile=True)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_row_of_a_mask_that_has_lost_its_rule_is_refused():
    model, = models("llama", "numformer")
    tokens, padding = batch()
    mask = numformer.torch.mask_of_transformers(
        3, 12, 12, mask_function=transformers.masking_utils.causal_mask_function, attention_mask=padding.bool())
    assert mask.shape == (3, 1, 1, 12)
    torch.testing.assert_close(model(tokens, attention_mask=mask).logits, model(tokens, attention_mask=padding).logits)
    with pytest.raises(ValueError, match="does not say what each of them sees"):
        model(tokens, attention_mask=mask.clone())


@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated")
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_a_prompt_in_pieces_gives_the_logits_of_the_whole(name):
    tokens, _ = batch()
    model, = models(name, "numformer")
    with torch.no_grad():
        whole = model(tokens).logits
        cache = transformers.DynamicCache(config=model.config)
        first, rest = (model(piece, past_key_values=cache) for piece in (tokens[:, :7], tokens[:, 7:]))
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_a_padded_prompt_in_pieces_goes_into_a_static_cache(name):
    tokens, _ = batch()
    padding = padded_on("left", tokens, 4, 2)
    ours, theirs = (
        model.generate(tokens, attention_mask=padding, max_new_tokens=8, do_sample=False, prefill_chunk_size=3,
                       cache_implementation="static", disable_compile=True)
        for model in models(name, "numformer", "eager"))
    assert torch.equal(ours, theirs)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable. is deprecated")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_checkpoints_of_either_kind_give_the_gradients_of_none(name, reentrant):
    tokens, padding = batch()
    model, = models(name, "numformer")
    model.train()
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        model(tokens, attention_mask=padding).logits[padding.bool()].square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, plain, rtol=0, atol=0)


def test_an_encoder_sees_both_ways():
    tokens, padding = batch()

    def run(implementation):
        model = transformers.AutoModel.from_config(
            transformers.BertConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                    intermediate_size=48), attn_implementation=implementation).eval()
        return [model(tokens, attention_mask=mask).last_hidden_state[padding.bool()] for mask in (padding, None)]
    agree(run, "sdpa")


def test_t5_adds_its_learned_bias_and_learns_it():
    tokens, padding = batch()

    def run(implementation):
        model = transformers.AutoModelForSeq2SeqLM.from_config(
            transformers.T5Config(vocab_size=61, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
                                  decoder_start_token_id=0), attn_implementation=implementation).eval()
        assert model.config._attn_implementation == implementation
        loss = model(tokens, attention_mask=padding, labels=tokens).loss
        loss.backward()
        return [loss, *(p.grad for p in model.parameters())]
    agree(run, "sdpa")


@pytest.mark.parametrize("name", ["PegasusX", "BigBirdPegasus"])
def test_a_decoder_that_is_causal_by_the_masks_of_eager_and_an_encoder_that_adds_to_them(name):
    tokens, padding = batch()
    config = getattr(transformers, f"{name}Config")(
        **SMALL, d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64, decoder_start_token_id=1)

    def run(implementation):
        model = transformers.AutoModelForSeq2SeqLM.from_config(config, attn_implementation=implementation).eval()
        return [model(tokens, attention_mask=mask, decoder_input_ids=tokens).logits for mask in (padding, None)]
    agree(run, "eager")


def test_a_model_that_adds_columns_to_the_masks_of_eager():
    tokens, _ = batch()
    config = transformers.DeepseekV4Config(
        **DECODER, head_dim=8, sliding_window=5, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        q_lora_rank=16, o_lora_rank=8, qk_rope_head_dim=4, index_topk=2, index_n_heads=2, index_head_dim=8,
        layer_types=["compressed_sparse_attention", "heavily_compressed_attention"],
        compress_rates={"compressed_sparse_attention": 2, "heavily_compressed_attention": 4})

    def run(implementation):
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()
        return [model(tokens).logits, model.generate(tokens[:, :1], max_new_tokens=12, do_sample=False)]
    agree(run, "eager")


def test_an_encoder_whose_layers_do_not_say_whether_they_are_causal():
    tokens, _ = batch()

    def run(implementation):
        model = transformers.AutoModel.from_config(
            transformers.SplinterConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                        intermediate_size=48), attn_implementation=implementation).eval()
        return [model(tokens).last_hidden_state]
    agree(run, "eager")


def test_bfloat16_runs_and_trains():
    pytest.importorskip("ml_dtypes")
    tokens, _ = batch()
    model, = models("llama", "numformer")
    exact = model(tokens).logits
    model.bfloat16()
    result = model(tokens, labels=tokens)
    result.loss.backward()
    assert (result.logits.float() - exact).abs().max() < 0.05 * exact.abs().max() + 0.02
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.bfloat16 for p in model.parameters())


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_model_runs_and_trains_under_autocast(name):
    pytest.importorskip("ml_dtypes")
    tokens, padding = batch()
    results = []
    for model in models(name, "numformer", reference(name)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result = model(tokens, attention_mask=padding)
            result.logits[padding.bool()].square().sum().backward()
        results.append([result.logits[padding.bool()], *(p.grad for p in model.parameters())])
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0.05 * theirs.abs().max().item())


def test_attention_weights_are_refused():
    model, = models("llama", "numformer")
    with pytest.raises(ValueError, match="eager"):
        model(batch()[0], output_attentions=True)


def test_sparse_attention_is_refused():
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.DeepseekV32Config(
            **DECODER | {"num_key_value_heads": 4}, moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2,
            n_group=1, topk_group=1, first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8,
            qk_nope_head_dim=8, v_head_dim=12, index_topk=4, index_n_heads=2, index_head_dim=16),
        attn_implementation="numformer")
    with pytest.raises(ValueError, match='DeepseekV32Attention, which is given indices: use "eager"'):
        model(batch()[0])


@pytest.mark.parametrize("config", ["BloomConfig", "MptConfig"])
def test_a_model_that_computes_its_attention_itself_is_refused(config):
    small = {"BloomConfig": {"hidden_size": 32, "n_layer": 1, "n_head": 4},
             "MptConfig": {"d_model": 32, "n_layers": 1, "n_heads": 4, "max_seq_len": 64}}[config]
    model = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, config)(vocab_size=61, **small), attn_implementation="numformer")
    tokens, padding = batch()
    for mask in (padding, torch.ones_like(padding), None):
        with pytest.raises(ValueError, match=f"a model of {config} computes its attention itself"):
            model(tokens, attention_mask=mask)


@pytest.mark.parametrize(("module", "name", "config", "sizes"), [
    ("blip.modeling_blip_text", "BlipTextModel", "BlipTextConfig",
     {"encoder_hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}),
    ("flava.modeling_flava", "FlavaTextModel", "FlavaTextConfig",
     {"intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}),
    ("trocr.modeling_trocr", "TrOCRForCausalLM", "TrOCRConfig",
     {"decoder_layers": 1, "decoder_attention_heads": 4, "decoder_ffn_dim": 32})])
def test_so_is_one_that_is_a_part_of_another(module, name, config, sizes):
    model = getattr(importlib.import_module(f"transformers.models.{module}"), name)._from_config(
        getattr(transformers, config)(vocab_size=61, hidden_size=32, **sizes), attn_implementation="numformer")
    tokens, padding = batch()
    with pytest.raises(ValueError, match=f"a model of {config} computes its attention itself"):
        model(tokens, attention_mask=padding)


def test_an_encoder_that_makes_its_own_row_of_a_mask():
    tokens, padding = batch()
    config = transformers.LayoutLMConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                         intermediate_size=48)
    results = []
    for implementation in ("numformer", "eager"):
        torch.manual_seed(0)
        model = transformers.AutoModel.from_config(config, attn_implementation=implementation).eval()
        results.append(model(tokens, attention_mask=padding).last_hidden_state[padding.bool()])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
