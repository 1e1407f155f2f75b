"""`examples/train.py` from data to what it publishes, with tiny encoders: plumbing only, the numbers mean nothing."""

import json
import os
import random
import subprocess
import sys

import pytest
import torch
from datasets import Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PIL
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModel, AutoProcessor, BertConfig, BertModel, PreTrainedTokenizerFast, ViTImageProcessorPil

from modeling_nrccr import EfficientNetLiteConfig, EfficientNetLiteModel
from modeling_nrccr.files import LOCK_FILE
from modeling_nrccr.training import experiment
from modeling_nrccr.training import run as train
from tests.support import ROOT


COLOURS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220), "black": (10, 10, 10)}
SHAPES = {"left": (2, 8, 14, 24), "right": (18, 8, 30, 24), "whole": (0, 0, 32, 32)}


def picture(colour: str, shape: str, generator: random.Random) -> PIL.Image:
    image = PIL.new("RGB", (32, 32), tuple(generator.randrange(200, 256) for _ in range(3)))
    image.paste(COLOURS[colour], SHAPES[shape])
    return image


def toy_dataset() -> DatasetDict:
    generator = random.Random(0)
    splits = {}
    for split, count in (("train", 40), ("validation", 12), ("test", 14)):
        rows = []
        for i in range(count):
            colour, shape = generator.choice(list(COLOURS)), generator.choice(list(SHAPES))
            caption = f"{colour} {shape}"
            held_out = split != "train"
            rows.append(
                {
                    "image_id": f"{'emoji' if i % 2 else 'stamps'}/{split}{i}",
                    "caption_id": f"{split}{i}#0",
                    "source_caption": caption,
                    "target_caption": f"o {shape} {colour}",
                    "back_translation": None if held_out else f"the {caption}",
                    "reference_source_caption": caption if held_out else None,
                    "image": picture(colour, shape, generator),
                }
            )
        text = {name: Value("string") for name in rows[0] if name != "image"}
        splits[split] = Dataset.from_list(rows, features=Features(text | {"image": Image()}))
    return DatasetDict(splits)


class Engine:
    name = "toy engine"


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoders")
    torch.manual_seed(0)
    words = {word: i for i, word in enumerate(["<pad>", "<unk>", *COLOURS, *SHAPES, "o", "the"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>").save_pretrained(
        folder / "t"
    )
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
    BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=20, **sizes)).save_pretrained(folder / "t")
    tower = EfficientNetLiteConfig(width_coefficient=0.25, depth_coefficient=0.3, hidden_size=16)
    EfficientNetLiteModel(tower).save_pretrained(folder / "v")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder / "v")
    return folder


@pytest.fixture(scope="module")
def published(encoders, tmp_path_factory):
    """The output folder of a run of two epochs."""
    output = tmp_path_factory.mktemp("run") / "demo"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "load_translated_dataset", lambda *args, **kwargs: (toy_dataset(), Engine()))
        patch.setattr(train, "find_font", lambda data_dir: None)
        flags = {
            "text_encoder": encoders / "t",
            "vision_encoder": encoders / "v",
            "output_dir": output,
            "num_train_epochs": 2,
            "per_device_train_batch_size": 10,
            "projection_dim": 8,
            "disable_tqdm": True,
        }
        train.train_recipe(**flags)
    return output


def test_a_run_writes_model_metrics_card_and_page(published):
    report = json.loads((published / "metrics.json").read_text())
    parts = {"validation", "test", "test_emoji", "test_stamps", "test_fused", "chance", "baselines", "settings"}
    assert set(report) == parts
    assert set(report["baselines"]) == {"english_only", "translated_query", "english_query"}
    names = {
        f"{way}_{metric}"
        for way in ("t2v", "v2t")
        for metric in ("recall@1", "recall@5", "recall@10", "median_rank", "mean_rank", "map")
    }
    assert set(report["test"]) == names | {"sum_recall", "mean_recall"}
    assert report["settings"]["translator"] == "toy engine" and report["settings"]["pictures"]["test"] == 14
    card = (published / "README.md").read_text()
    assert "toy engine" in card and f"{report['test']['sum_recall']:.1f}" in card and "{" not in card.split("```")[0]
    html = (published / "search.html").read_text()
    assert "Picture search in Galician" in html and html.count("<section") == 8
    assert PIL.open(published / "search.png").size[0] > 800
    pickled = (".bin", ".pt", ".pth", ".pkl", ".pickle")
    assert not [path for path in published.rglob("*") if path.suffix in pickled]


def test_what_it_writes_loads_and_equals_its_numbers(published):
    from modeling_nrccr.retrieval.evaluation import evaluate_dataset

    model, processor = AutoModel.from_pretrained(published).eval(), AutoProcessor.from_pretrained(published)
    results = evaluate_dataset(model, processor, toy_dataset()["test"], show_progress=False)
    report = json.loads((published / "metrics.json").read_text())
    assert results["all"]["metrics"] == pytest.approx(report["test"])
    assert results["emoji"]["metrics"] == pytest.approx(report["test_emoji"])


def test_the_cards_snippet_runs(published, tmp_path):
    snippet = (published / "README.md").read_text().split("```python\n")[1].split("```")[0]
    (tmp_path / "snippet.py").write_text(snippet)
    command = [sys.executable, str(tmp_path / "snippet.py")]
    result = subprocess.run(command, cwd=published.parent, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert -1 <= float(result.stdout.strip().splitlines()[-1]) <= 1


def test_a_language_is_added_to_a_base(published, encoders, tmp_path):
    flags = {
        "base": published,
        "text_encoder": encoders / "t",
        "vision_encoder": encoders / "v",
        "train_language": "gl",
        "adapter": "kind=lora,layers=2,rank=2",
        "text_only": True,
        "output_dir": tmp_path / "gl",
        "losses": "feature_distillation=1",
        "num_train_epochs": 2,
        "per_device_train_batch_size": 10,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "search_page": "none",
        "disable_tqdm": True,
        "feature_cache_dir": tmp_path / "features",
    }
    arguments = [part for key, value in flags.items() for part in (f"--{key}", str(value))]
    calibrate, shifts = train.NrccrTrainer.calibrate_language, []

    def calibrated(trainer):
        for base in (None, trainer.base):
            trainer.base = base
            calibrate(trainer)
            shifts.append(trainer.model.adapter("gl").shift.clone())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.NrccrTrainer, "calibrate_language", calibrated)
        patch.setattr(experiment, "load_translated_dataset", lambda *args, **kwargs: (toy_dataset(), Engine()))
        train.run(*train.parse_arguments(arguments))
        with pytest.raises(ValueError, match="was trained with split seed 0"):
            train.run(*train.parse_arguments([*arguments, "--split_seed", "1"]))
        with pytest.raises(ValueError, match="has no pictures: set text_only"):
            patch.setattr(experiment, "lexicon_rows", lambda *args: toy_dataset()["train"].to_list())
            train.run(*train.parse_arguments([*arguments, "--lexicon", "wordnet:9", "--text_only", "false"]))
    assert shifts[1].any()  # what is known of the base calibrates as a pass of the new model does
    torch.testing.assert_close(shifts[0], shifts[1], atol=1e-6, rtol=0)
    base, model = AutoModel.from_pretrained(published).eval(), AutoModel.from_pretrained(tmp_path / "gl").eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "gl")
    inputs = processor(text=["o left red"], return_tensors="pt")
    assert model.language == "gl"
    cached = sorted(path.name.split("-")[0] for path in (tmp_path / "features").glob("*.safetensors"))
    assert cached == ["images", "texts", "texts"]
    with torch.no_grad():
        before, english = (m.get_text_features(**inputs, languages=[None]).pooler_output for m in (base, model))
        target = model.get_text_features(**inputs).pooler_output
    # as equal as two loadings of one model are: on some machines a product depends on where in memory its factors lie
    torch.testing.assert_close(before, english, atol=1e-6, rtol=0)
    assert not torch.allclose(target, english, atol=1e-4)
    report = json.loads((tmp_path / "gl/metrics.json").read_text())
    assert set(report["baselines"]) == {"english_only", "translated_query", "english_query"}


def test_a_base_is_trained_first_on_the_same_data(tmp_path, monkeypatch):
    flags = "--recipe demo --split_seed 3 --text_head linear --bf16_if_fast no --output_dir".split()
    script, model, args = train.parse_arguments([*flags, str(tmp_path / "gl")])
    calls = []
    monkeypatch.setattr(train, "train_recipe", lambda recipe, **fields: calls.append(([], recipe, fields)))

    def parse_call():
        arguments, recipe, fields = calls.pop()
        return train.parse_arguments(arguments, recipe, **fields)

    folder = train.train_base(script, model, args)
    of_base, its_model, its_args = parse_call()
    assert (folder, its_args.output_dir) == (str(tmp_path / "gl-base"),) * 2
    assert (of_base.split_seed, of_base.translator, its_model.text_head) == (3, script.translator, "linear")
    assert of_base.base is None and its_args.needed_views() == ("source",) and not its_args.text_only
    assert its_args.per_device_train_batch_size > args.per_device_train_batch_size  # its own recipe otherwise
    given = ["--per_device_train_batch_size", "7", "--max_steps", "3", "--losses", "feature_distillation=0.5"]
    args.resume_from_checkpoint = "true"  # it was killed before it was whole
    train.train_base(script, model, args, given)
    _, _, its_args = parse_call()
    assert (its_args.per_device_train_batch_size, its_args.max_steps) == (7, 3) and not its_args.needs_teacher()
    assert its_args.resume_from_checkpoint == "true"
    (tmp_path / "gl-base").mkdir()
    (tmp_path / "gl-base/metrics.json").write_text("{}")
    train.train_base(script, model, args)
    assert not calls  # what is there is not trained again


@pytest.mark.parametrize("target, count, rows", [("translated", 5, 45), ("translated", -1, 80), ("human", 5, 5)])
def test_some_human_captions(target, count, rows, monkeypatch):
    def load(*args, **kwargs):
        dataset = toy_dataset()
        human = [f"{args[4]} {caption}" for caption in dataset["train"]["target_caption"]]
        dataset["train"] = dataset["train"].remove_columns("target_caption").add_column("target_caption", human)
        return dataset, Engine()

    monkeypatch.setattr(experiment, "load_translated_dataset", load)
    parsed = train.parse_arguments(["--target_captions", target, "--human_captions", str(count)])
    captions = experiment.Experiment(*parsed).rows["train"]["target_caption"]
    assert len(captions) == rows
    assert sum(caption.startswith("human") for caption in captions) == (count if count > 0 else 40)
    with pytest.raises(ValueError, match="human_captions=41, but there are 40"):
        experiment.Experiment(*train.parse_arguments(["--human_captions", "41"]))


def test_checkpoints_of_an_earlier_run_are_not_lost_silently(published, encoders):
    flags = ["--text_encoder", str(encoders / "t"), "--vision_encoder", str(encoders / "v"), "--overwrite", "false"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "load_translated_dataset", lambda *args, **kwargs: (toy_dataset(), Engine()))
        with pytest.raises(ValueError, match="--resume_from_checkpoint true goes on"):
            train.run(*train.parse_arguments([*flags, "--output_dir", str(published), "--projection_dim", "8"]))


def test_the_english_only_baseline_learns_from_its_own_terms_alone(monkeypatch):
    asked = {}

    class Asked(experiment.Experiment):
        def train(self, name, **changes):
            asked.update({name: changes})
            raise InterruptedError

    monkeypatch.setattr(experiment, "load_translated_dataset", lambda *args, **kwargs: (toy_dataset(), Engine()))
    monkeypatch.setattr(train, "Experiment", Asked)
    parsed = train.parse_arguments(["--losses", "triplet=0.3,contrastive=1,target_triplet=1,back_translation=2"])
    with pytest.raises(InterruptedError):
        train.run(*parsed)
    assert asked["english_only"]["losses"] == {"triplet": 0.3, "contrastive": 1.0}


def test_a_second_run_in_one_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "train_and_test", lambda *args: pytest.fail("it ran"))
    (tmp_path / "out-checkpoints").mkdir()
    holder = (
        "import sys, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire();"
        "print(1, flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", holder, str(tmp_path / "out-checkpoints" / LOCK_FILE)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.read(1)
        with pytest.raises(TimeoutError, match="another run is writing .*out"):
            train.run(*train.parse_arguments(["--output_dir", str(tmp_path / "out")]))
        other.stdin.close()


def test_flags_win_over_the_file_and_unknown_fields_are_named(tmp_path):
    script, model, args = train.parse_arguments(["--language", "ca", "--learning_rate", "0.5"])
    assert (script.language, args.learning_rate, model.text_prefix) == ("ca", 0.5, "query: ")
    (tmp_path / "bad.yaml").write_text("learning_rat: 1\n")
    (tmp_path / "old.yaml").write_text("dataset: tuxpaint\n")
    for name, words in (
        ("bad", "learning_rat is no field .do you mean learning_rate"),
        ("old", "dataset is now data"),
    ):
        with pytest.raises(ValueError, match=rf"{name}\.yaml: {words}"):
            train.parse_arguments(["--recipe", str(tmp_path / f"{name}.yaml")])
    for flags, words in (
        ("--target_language gl", "--target_language is now --language"),
        ("--config demo.yaml", "--config is now --recipe"),
        ("--recipe dem", "unknown recipe 'dem' .do you mean demo"),
        ("--recipe no.yaml", "no.yaml: there is no such file"),
        ("--langage gl", "--langage is no field .do you mean language"),
        ("gl", "gl: nothing takes this"),
    ):
        with pytest.raises(ValueError, match=words):
            train.parse_arguments(flags.split())
    assert train.parse_arguments([], "paper/vatex", language="de", output_dir=tmp_path)[0].language == "de"


@pytest.mark.slow
def test_two_processes_of_the_command(encoders, tmp_path):
    """They train together, and end in one line, whatever it is."""
    generator, lines = random.Random(0), ["image,caption,target_caption,split"]
    for split, count in (("train", 40), ("validation", 8), ("test", 8)):
        for i in range(count):
            colour, shape = generator.choice(list(COLOURS)), generator.choice(["left", "right"])
            picture(colour, shape, generator).save(tmp_path / f"{split}{i}.png")
            lines.append(f"{split}{i}.png,the {colour} {shape},o {shape} {colour},{split}")
    (tmp_path / "captions.csv").write_text("\n".join(lines))
    flags = {
        "num_processes": 2,
        "data": tmp_path / "captions.csv",
        "target_captions": "human",
        "translator": "none",
        "losses": "contrastive=1,target_contrastive=1",
        "baselines": False,
        "search_page": "none",
        "text_encoder": encoders / "t",
        "vision_encoder": encoders / "v",
        "output_dir": tmp_path / "out",
        "num_train_epochs": 1,
        "per_device_train_batch_size": 10,
        "projection_dim": 8,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    command = [sys.executable, "-m", "modeling_nrccr", "train"]
    command += [part for key, value in flags.items() for part in (f"--{key}", str(value))]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    options = {"env": environment, "capture_output": True, "text": True, "timeout": 300}
    result = subprocess.run(command, **options)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("wrote ") == 1 and (tmp_path / "out/model.safetensors").exists()
    result = subprocess.run([*command, "--learning_rate", "0"], **options)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.splitlines()[-1] == "error: learning_rate=0.0: it must be above 0"
    assert "Traceback" not in result.stderr and result.stderr.count("learning_rate") == 1
