"""Released checkpoints of any size -> this package; the recorded numbers themselves are in test_parity.py."""

import argparse
import math
import os

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModel, BertConfig, BertModel

from modeling_nrccr import LanguageDiscriminator, NrccrModel
from modeling_nrccr.cli import convert
from modeling_nrccr.processing_nrccr import NrccrTextProcessor
from modeling_nrccr.training.conversion import convert_original_checkpoint
from modeling_nrccr.training.convert_original import bert_config_of, convert_original
from tests.support import reference


DIM = 14  # of the common space


def layer_norm(width):
    return {"weight": torch.rand(width) + 0.5, "bias": torch.randn(width)}


def linear(width, out):
    return {"weight": torch.randn(out, width), "bias": torch.randn(out)}


def flat(parts: dict, prefix: str = "") -> dict[str, torch.Tensor]:
    if not isinstance(parts, dict):
        return {prefix: parts}
    return {k: t for name, part in parts.items() for k, t in flat(part, f"{prefix}.{name}".strip(".")).items()}


def head(width: int, hidden: int, key_query_size: int, positions: int) -> dict:
    return {
        "input_proj_layer": {"LayerNorm": layer_norm(width), "net": {"1": linear(width, hidden)}},
        "pos_embed_layer": {
            "position_embeddings": {"weight": torch.randn(positions, hidden)},
            "LayerNorm": layer_norm(hidden),
        },
        "encoder_layer": {
            "self": {
                "query": linear(hidden, key_query_size),
                "key": linear(hidden, key_query_size),
                "value": linear(hidden, hidden),
            },
            "output": {"dense": linear(hidden, hidden), "LayerNorm": layer_norm(hidden)},
        },
    }


def projection(width: int) -> dict[str, torch.Tensor]:
    statistics = {"running_mean": torch.randn(DIM), "running_var": torch.rand(DIM) + 0.5}
    batch_norm = layer_norm(DIM) | statistics | {"num_batches_tracked": torch.tensor(3)}
    return flat({"mapping": {"fc1": linear(width, DIM), "bn_1": batch_norm}})


def random_checkpoint(seed: int = 0, prefix: str = "", kind: str | None = None, **changes):
    """State dicts with the released names, their options and the text encoder's config."""
    torch.manual_seed(seed)
    options = reference.options("forward_video") | dict(
        visual_feat_dim=13,
        visual_mapping_layers=[18, DIM],
        text_mapping_layers=[20, DIM],
        video_hidden_size=18,
        text_hidden_size=20,
        video_num_attention=3,
        text_num_attention=5,
        key_query_size=30,
    )
    options |= changes
    bert = BertConfig(
        vocab_size=31,
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=17,
        max_position_embeddings=23,
    )
    text = head(24, options["text_hidden_size"], options["key_query_size"], 19)
    text["text_bert"] = {"text_bert": BertModel(bert).state_dict()}
    if options["model_type"] == "video":
        visual = head(13, options["video_hidden_size"], options["key_query_size"], 11)
    else:
        visual = {"proj": linear(13, 13)}
    visual_width = options["video_hidden_size"] if options["model_type"] == "video" else 13
    maps = [projection(visual_width), projection(options["text_hidden_size"])]
    parts = [flat(visual, prefix), flat(text, prefix), *maps]
    if kind:
        judge = LanguageDiscriminator(24, kind).state_dict()
        parts.append({f"discriminator.{name.replace('classify', 'model')}": t for name, t in judge.items()})
    return parts, options, bert.to_dict()


def plain_head(weights: dict, states: torch.Tensor, mask: torch.Tensor, heads: int, pooling: str) -> torch.Tensor:
    """The released head, written down once more as the paper's equations."""

    def apply(name, x):
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(name, x):
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])

    x = apply("input_proj_layer.net.1", norm("input_proj_layer.LayerNorm", states)).relu()
    x = norm("pos_embed_layer.LayerNorm", x + weights["pos_embed_layer.position_embeddings.weight"][: x.shape[1]])
    query, key, value = (apply(f"encoder_layer.self.{name}", x).chunk(heads, -1) for name in ("query", "key", "value"))
    both = mask[:, :, None] * mask[:, None, :]
    contexts = []
    for q, k, v in zip(query, key, value):
        scores = q @ k.transpose(1, 2) / math.sqrt(x.shape[-1] / heads) + (1 - both) * -10000
        contexts.append(scores.softmax(-1) @ v)
    x = norm("encoder_layer.output.LayerNorm", apply("encoder_layer.output.dense", torch.cat(contexts, -1)) + x)
    return x.mean(1) if pooling == "mean" else x.amax(1)


def plain_projection(weights: dict, x: torch.Tensor) -> torch.Tensor:
    x = F.linear(x, weights["mapping.fc1.weight"], weights["mapping.fc1.bias"])
    bn = {name.removeprefix("mapping.bn_1."): t for name, t in weights.items()}
    x = (x - bn["running_mean"]) / (bn["running_var"] + 1e-5).sqrt() * bn["weight"] + bn["bias"]
    return x / x.norm(dim=-1, keepdim=True)


def inputs():
    mask = (torch.arange(7) < torch.tensor([7, 2, 4, 1])[:, None]).double()
    return torch.randint(1, 31, (4, 7)), torch.randn(4, 7, 13).double(), mask


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"video_pooling": "max", "text_pooling": "max", "video_num_attention": 2, "text_num_attention": 2},
        {"model_type": "img", "visual_mapping_layers": [13, DIM], "key_query_size": 20, "text_num_attention": 4},
    ],
)
def test_other_sizes_pooling_and_head_counts(changes):
    """Against the equations, in float64: padding is pooled, and attends to everything."""
    for seed in (1, 2):
        state_dicts, options, text_config = random_checkpoint(seed, **changes)
        model, _, _ = convert_original_checkpoint(state_dicts, options, text_config)
        model.double()
        visual, text, visual_map, text_map = ({k: t.double() for k, t in part.items()} for part in state_dicts)
        ids, frames, mask = inputs()
        with torch.no_grad():
            encoded = model.get_text_features(ids, mask)
            heads, pooling = options["text_num_attention"], options["text_pooling"]
            plain = plain_head(text, encoded.last_hidden_state, mask, heads, pooling)
            assert torch.allclose(encoded.pooler_output, plain_projection(text_map, plain), atol=1e-12)
            if options["model_type"] == "video":
                plain = plain_head(visual, frames, mask, options["video_num_attention"], options["video_pooling"])
            else:
                frames, mask = frames[:, 0], None
                plain = F.linear(frames, visual["proj.weight"], visual["proj.bias"]).relu()
            embeds = model.get_image_features(visual_feats=frames, visual_attention_mask=mask).pooler_output
        assert torch.allclose(embeds, plain_projection(visual_map, plain), atol=1e-12)


@pytest.mark.parametrize("kind", ["weak", "not-so-weak", "strong"])
def test_discriminator_of_any_kind_and_data_parallel_prefixes(kind):
    state_dicts, options, text_config = random_checkpoint(prefix="module", kind=kind)
    assert all(name.startswith("module.") for part in state_dicts[:2] for name in part)
    model, discriminator, _ = convert_original_checkpoint(state_dicts, options, text_config)
    assert discriminator.kind == kind and discriminator.pool_padding
    for name, tensor in discriminator.state_dict().items():
        assert torch.equal(tensor, state_dicts[4][f"discriminator.{name.replace('classify', 'model')}"])
    plain, _, _ = random_checkpoint()
    again, none, _ = convert_original_checkpoint(plain, options, text_config)
    assert none is None
    initial = {"logit_scale"}  # has no counterpart
    assert all(torch.equal(t, again.state_dict()[k]) for k, t in model.state_dict().items() if k not in initial)
    assert convert_original_checkpoint([*plain, None], options, text_config)[1] is None


def test_every_fault_of_the_tensors_is_named():
    state_dicts, options, text_config = random_checkpoint(kind="strong")
    del state_dicts[0]["encoder_layer.self.key.bias"]
    state_dicts[1]["input_proj_layer.net.1.weight"] = torch.zeros(3, 4)
    state_dicts[2]["mapping.fc2.weight"] = torch.zeros(1)
    with pytest.raises(ValueError) as error:
        convert_original_checkpoint(state_dicts, options, text_config)
    for told in (
        "visual encoder lacks encoder_layer.self.key.bias",
        "input_proj_layer.net.1.weight of the text encoder has shape (3, 4), not (20, 24)",
        "visual projection has an extra mapping.fc2.weight",
    ):
        assert told in str(error.value)

    state_dicts, options, text_config = random_checkpoint(kind="strong")
    with pytest.raises(ValueError, match="discriminator lacks model.0.weight"):
        convert_original_checkpoint(state_dicts, options | {"disc_type": "not-so-weak"}, text_config)
    with pytest.raises(ValueError, match="3 state dicts"):
        convert_original_checkpoint(state_dicts[:3], options, text_config)


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"video_layer": 2}, "video_layer=2"),
        ({"loss_fun": "cel"}, "loss_fun='cel'"),
        ({"measure": "hamming"}, "measure='hamming'"),
        ({"visual_mapping_layers": [18, 16, DIM]}, "visual_mapping_layers"),
        ({"layer_list": ["layer.2", "layer.3"]}, r"layer.3'\]: the text encoder has layer.0 to layer.2"),
        ({"disc_type": "stronger", "kind": "weak"}, "'stronger'"),
    ],
)
def test_options_of_no_use_are_refused(changes, told):
    state_dicts, options, text_config = random_checkpoint(kind=changes.pop("kind", None))
    with pytest.raises(ValueError, match=told):
        convert_original_checkpoint(state_dicts, options | changes, text_config)
    with pytest.raises(ValueError, match="options lack margin"):
        convert_original_checkpoint(state_dicts, {k: v for k, v in options.items() if k != "margin"}, text_config)


def test_options_become_the_loss_and_the_trained_layers():
    settings = dict(
        tri_alpha=0.7,
        dtl_beta=0.2,
        l1_gama=0.3,
        back_w=0.9,
        scale=0.05,
        margin=0.4,
        max_violation=False,
        cost_style="mean",
        direction="t2v",
        measure="order",
        layer_list=["layer.2", "layer.1.", "bert.pooler"],
    )
    state_dicts, options, text_config = random_checkpoint(**settings)
    model, _, loss = convert_original_checkpoint(state_dicts, options, text_config)
    s = loss.settings
    assert s.losses == {
        "triplet": 1,
        "target_triplet": 0.7,
        "distillation": 0.2,
        "feature_distillation": 0.3,
        "back_translation": 0.9,
        "adversarial": 0.05,
    }
    assert (s.margin, s.hardest_negatives) == (0.4, False)
    assert (s.triplet_reduction, s.triplet_direction, s.triplet_measure) == ("mean", "t2v", "order")
    assert model.text_tower.num_trained_layers == 2 and trained_layers(model) == {1, 2}
    model, _, _ = convert_original_checkpoint(state_dicts, options | {"layer_list": ["layer.1"]}, text_config)
    assert model.text_tower.num_trained_layers == 2 and trained_layers(model) == {1}
    assert not any(p.requires_grad for p in model.text_tower.encoder.embeddings.parameters())


def trained_layers(model) -> set[int]:
    layers = enumerate(model.text_tower.encoder.encoder.layer)
    return {number for number, layer in layers if all(p.requires_grad for p in layer.parameters())}


@pytest.mark.parametrize("file", ["forward_img", "forward_video"])
def test_saving_and_reloading_keeps_the_published_behaviour(file, tmp_path):
    model, _, _ = reference.converted(file, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    again = NrccrModel.from_pretrained(tmp_path).eval()
    assert again.config.pool_padding and again.config.attention_score_scale == "hidden"
    assert again.config.projection_norm == "batch_norm" and again.config.teacher_view == "cross"
    batch = reference.batch(file, dtype=torch.float32)
    with torch.no_grad():
        before, after = model(**batch), again(**batch)
    embeds = [name for name in before if name.endswith("_embeds")]
    assert len(embeds) == 5 and all(torch.equal(before[name], after[name]) for name in embeds)


# ----------------------------------------------------------------------------------------- nrccr convert


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory):
    """A tokenizer and a config with the sizes of the recorded text encoder."""
    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "ete", "Été", "a"]
    (folder / "vocab.txt").write_text("\n".join(words + [f"w{i}" for i in range(192)]), encoding="utf-8")
    BertConfig(**reference.settings("forward_img")["bert_config"]).save_pretrained(folder)
    return folder


def released_file(path, **changes):
    """A file with the keys of a released one."""
    parts = reference.state_dicts("forward_img", "weak")
    parts[:2] = [{f"module.{name}": t for name, t in part.items()} for part in parts[:2]]
    parts[1]["module.text_bert.text_bert.embeddings.position_ids"] = torch.arange(40)[None]  # of old transformers
    checkpoint = {
        "epoch": 7,
        "model": parts,
        "opt": argparse.Namespace(**reference.options("forward_img"), rootpath="/home/x"),
        "best_rsum": np.float64(271.5),
        "Eiters": 1234,
    }
    torch.save(checkpoint | changes, path)
    return path


def test_a_released_file_becomes_a_folder_that_auto_classes_load(tmp_path, bert_folder, capsys):
    file = released_file(tmp_path / "model_best.pth.tar")
    convert.main(
        [str(file), str(tmp_path / "out"), "--text_config", str(bert_folder), "--tokenizer", str(bert_folder)]
    )
    model = AutoModel.from_pretrained(tmp_path / "out").eval()
    batch = reference.batch("forward_img", dtype=torch.float32)
    with torch.no_grad():
        embeds = model(**batch).text_embeds
    assert torch.allclose(embeds, reference.tensors("forward_img")["f32/text_emb.source"], atol=2e-4)
    processor = NrccrTextProcessor.from_pretrained(tmp_path / "out")
    assert processor(text=["Été A"])["input_ids"] == [[2, 5, 7, 3]]  # lower-cased, without accents, as released
    card = (tmp_path / "out" / "README.md").read_text()
    assert "padding is pooled" in card and "margin 0.2" in card and "/home" not in card
    assert not any(name.endswith((".bin", ".pt", ".tmp")) for name in os.listdir(tmp_path / "out"))

    convert.main([str(file), str(tmp_path / "bare"), "--text_config", str(bert_folder)])
    assert "no processor" in capsys.readouterr().out.splitlines()[-3]
    assert not (tmp_path / "bare" / "processor_config.json").exists()
    with pytest.raises(ValueError, match="not empty"):
        convert_original(file, tmp_path / "out")
    with pytest.raises(ValueError, match="--text_config"):  # its heads are not 64 wide, and no config tells
        convert_original(file, tmp_path / "new")


def test_the_sizes_of_a_bert_are_read_from_its_tensors():
    config = dict(
        vocab_size=31,
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=17,
        max_position_embeddings=23,
        type_vocab_size=2,
    )
    tensors = flat({"module": {"text_bert": {"text_bert": BertModel(BertConfig(**config)).state_dict()}}})
    assert bert_config_of(tensors) == config


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_anything_but_a_checkpoint_is_refused(tmp_path):
    file, mark = tmp_path / "evil.pth.tar", tmp_path / "executed"
    for where in ("best_rsum", "opt", "model"):
        released_file(file, **{where: Malicious(mark)})
        with pytest.raises(ValueError, match=r"refused.*(posix|os)\.mkdir"):
            convert_original(file, tmp_path / "out")
    assert not mark.exists() and not (tmp_path / "out").exists()
    file.write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match="refused"):
        convert_original(file, tmp_path / "out")
    torch.save({"state_dict": {}}, file)
    with pytest.raises(ValueError, match="holds state_dict"):
        convert_original(file, tmp_path / "out")
