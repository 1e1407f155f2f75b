import pytest
import torch

from modeling_nrccr import DataCollatorForCrossLingualRetrieval
from tests.support import WordProcessor, toy_rows


def test_each_view_has_its_own_keys_and_length():
    collator = DataCollatorForCrossLingualRetrieval(WordProcessor())
    batch = collator(toy_rows(4))
    assert {key: tuple(value.shape) for key, value in batch.items()} == {
        "input_ids": (4, 3),
        "attention_mask": (4, 3),
        "target_input_ids": (4, 3),
        "target_attention_mask": (4, 3),
        "back_translation_input_ids": (4, 4),
        "back_translation_attention_mask": (4, 4),
        "visual_feats": (4, 1, 13),
        "image_ids": (4,),
    }
    collator.views = ("source",)
    assert set(collator(toy_rows(4))) == {"input_ids", "attention_mask", "visual_feats", "image_ids"}


def test_videos_are_padded_and_ids_are_stable():
    rows = [row | {"image": None, "visual_feats": torch.randn(n, 13)} for row, n in zip(toy_rows(3), (2, 5, 1))]
    batch = DataCollatorForCrossLingualRetrieval(WordProcessor(), views=("source",))(rows)
    assert batch["visual_feats"].shape == (3, 5, 13)
    assert batch["visual_attention_mask"].sum(1).tolist() == [2, 5, 1]
    assert batch["image_ids"][0].item() == 4573653301137829118 and len(set(batch["image_ids"].tolist())) == 3


@pytest.mark.parametrize("caption", [None, "", "  "])
def test_a_missing_caption_names_row_and_remedy(caption):
    rows = toy_rows(2)
    rows[1]["target_caption"] = caption
    with pytest.raises(ValueError, match=r"target_caption of 'toy/1#0' is .*translate the data set first"):
        DataCollatorForCrossLingualRetrieval(WordProcessor())(rows)


def test_videos_are_loaded_from_what_their_column_holds():
    def processor(text=None, videos=None, **kwargs):
        return {"pixel_values": list(map(len, videos))} if videos else {"input_ids": text}

    rows = [row | {"image": None, "video": {"path": "ab" * n}} for n, row in enumerate(toy_rows(2), 1)]
    collator = DataCollatorForCrossLingualRetrieval(
        processor, ("source",), load_video=lambda video: list(video["path"])
    )
    assert collator(rows)["pixel_values"] == [2, 4]


def test_a_group_of_rows_comes_into_one_batch_whole(word_processor):
    rows = toy_rows(6)
    collator = DataCollatorForCrossLingualRetrieval(word_processor, ("target",), with_media=False)
    grouped, flat = collator([rows[:2], rows[2:6]]), collator(rows)
    assert grouped.keys() == flat.keys()
    assert all(grouped[name].equal(flat[name]) for name in flat)
