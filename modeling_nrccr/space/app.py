"""The page of the Space: `python app.py` in the folder that `nrccr space` wrote, then http://127.0.0.1:7860"""

import json
import os
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from urllib.parse import quote

import gradio as gr
from gradio.utils import get_upload_folder
from starlette.middleware import Middleware

from ..retrieval.metrics import fuse_query_embeds
from ..retrieval.retriever import Hit
from . import cards
from .cards import Card
from .finder import IMAGE_SUFFIXES, MAX_BYTES, MAX_OWN, Finder, OwnPictures, Query, read_upload
from .uploads import MAX_AGE, UploadLimit


@dataclass(frozen=True)
class Language:
    """What the page knows of a language: its names (its own, English) and queries that work well."""

    name: str
    english: str
    examples: tuple[str, ...]


# by code, the first one first; each needs names in CLDR, and for the noise view an Apertium pair; shown are English
# and what the model has learned
LANGUAGES = {
    "gl": Language(
        "Galego",
        "Galician",
        ("un gato que sorrí", "igrexa", "unha flor vermella", "instrumento musical", "libro azul", "barco de vela"),
    ),
    "ca": Language(
        "Català",
        "Catalan",
        ("un gat que somriu", "església", "una flor vermella", "instrument musical", "llibre blau", "vaixell de vela"),
    ),
    "es": Language(
        "Español",
        "Spanish",
        ("un gato que sonríe", "iglesia", "una flor roja", "instrumento musical", "libro azul", "barco de vela"),
    ),
    "en": Language(
        "English",
        "English",
        ("a smiling cat", "church", "a red flower", "musical instrument", "blue book", "a boat on the sea"),
    ),
}
PICTURES, CLIPS, OWN = "Pictures", "Clips", "Mine"
FOUND, EXPLAINED, COMPARED = 10, 3, 6  # pictures of an answer, in the word view, in each column of the noise view

THEME = gr.themes.Default(
    primary_hue="blue", neutral_hue="stone", radius_size="lg", font=["system-ui", "sans-serif"]
).set(body_background_fill="#faf9f6", body_background_fill_dark="#141517", block_shadow="none")


class Page:
    """Turns what a visitor does into HTML. `finder`: [`Finder`] of the folder that is served."""

    def __init__(self, finder: Finder, weight: float):
        self.finder, self.weight = finder, weight
        self.thumbnail = lru_cache(4096)(lambda id: cards.data_uri(finder.gallery.picture(id)))

    def index(self, where: str, own: OwnPictures | None):
        return {PICTURES: self.finder.pictures, CLIPS: self.finder.clips, OWN: own and own.index}[where]

    def cards(self, embed, hits: list[Hit], language: str, own: OwnPictures | None) -> list[Card]:
        """Return the cards of the hits as far as their pictures are still there."""
        frames = self.finder.best_frames(embed, hits) if any(hit.id.startswith("clips/") for hit in hits) else {}
        found, gallery = [], self.finder.gallery
        for hit in hits:
            if hit.id.startswith("own/"):
                name, picture = own.pictures[hit.id]
                found.append(Card(picture, name, "", hit.score))
                continue
            try:
                picture = self.thumbnail(frames.get(hit.id, hit.id))
            except (OSError, ValueError):  # another release of Debian may lack one
                continue
            clip = f"gradio_api/file={quote(str(gallery.clip_file(hit.id)))}" if hit.id in frames else None
            english = gallery.name(hit.id, "en") or ""
            name = gallery.name(hit.id, language) or english
            found.append(Card(picture, name, english, hit.score, not hit.metadata["seen"], clip))
        return found

    def ask(self, box: dict, language: str) -> tuple[Query | None, dict, str]:
        """Return the query in the search box, the box without its picture, and what is wrong with it."""
        # left alone where it can be: somebody may be typing the next query by now
        text = box["text"].encode("utf-8", "replace").decode()  # halves of characters cannot be sent back
        emptied = {"text": text, "files": []} if box["files"] else gr.skip()
        try:
            picture = read_upload(box["files"][0]) if box["files"] else None
            return self.finder.query(box["text"], language, picture), emptied, ""
        except ValueError as error:
            return None, emptied, cards.note(str(error), "error")
        finally:
            discard(box["files"])

    def results(self, query: Query | None, where: str, unseen: bool, own: OwnPictures | None) -> str:
        index = self.index(where, own)
        if index is None:
            return cards.note("You have added no pictures yet: see “Your own”.")
        if query is None:
            return ""
        hits = self.finder.search(query.embed, index, FOUND, unseen)
        what = {PICTURES: "pictures", CLIPS: "clips", OWN: "pictures of yours"}[where]
        of = f"Best of {len(index):,} {what}" + ", unseen ones only" * unseen
        found = self.cards(query.embed, hits, query.language, own)
        return cards.results(found, query.text, query.picture, of)

    def why(self, query: Query | None, where: str, unseen: bool, own: OwnPictures | None) -> str:
        index = self.index(where, own)
        if index is None or query is None or not query.text:
            return cards.note("Ask with a sentence to see which of its words count.")
        embed = self.finder.embed_texts([query.text], query.language)[0]
        hits = self.finder.search(embed, index, EXPLAINED, unseen)
        return cards.why(self.finder.word_weights(query, index, hits), self.cards(embed, hits, query.language, own))

    def noise(self, query: Query | None, where: str, unseen: bool, own: OwnPictures | None) -> str:
        index = self.index(where, own)
        if index is None or query is None or not query.text:
            return cards.note("Ask with a sentence to see what its machine translation finds.")
        text, source, target = query.text, query.language, self.finder.counterpart(query.language)
        answer = self.finder.translate(text, source)
        if answer is None:
            return cards.note("There is no translation engine for this language here.")
        translation, engine = answer
        kept = {word for word in map(cards.plain, text.split()) if len(word) > 3}
        asked = self.finder.embed_texts([text], source)[0]
        translated = self.finder.embed_texts([translation], target)[0]
        queries = [
            (f"As asked, in {LANGUAGES[source].english}", text, set(), asked),
            (f"In {LANGUAGES[target].english}, by {engine.capitalize()}", translation, kept, translated),
        ]
        if target == "en":
            fused = fuse_query_embeds(asked, translated, self.weight)
            queries.append((f"Both, with weight {self.weight:g} for the translation", text, set(), fused))
        columns = []
        for heading, words, marked, embed in queries:
            hits = self.finder.search(embed, index, COMPARED, unseen)
            columns.append((heading, words, marked, self.cards(embed, hits, source, own)))
        return cards.noise(columns)

    def add(self, files: list[str] | None, own: OwnPictures | None):
        """Take files. Return the visitor's pictures, where to search now, and what became of the files."""
        try:
            own, refused = self.finder.add_own(own, files or [])
        finally:
            discard(files or [])
        shown = [Card(picture, name, "") for name, picture in own.pictures.values()] if own else []
        said = [cards.note(line, "error") for line in refused]
        if shown:
            said.append(cards.note(f"{len(shown)} here, for you alone; they go when you close the page."))
            said.append(cards.grid(shown))
        return own, gr.update(value=OWN) if shown else gr.update(), "".join(said), None


def discard(files: list[str]):
    """Deletes uploads at once; their pictures are in memory by now."""
    for file in map(Path, files):
        if file.resolve().is_relative_to(get_upload_folder()):
            file.unlink(missing_ok=True)


def build(finder: Finder, weight: float = 0.5) -> gr.Blocks:
    """Build the page over a finder; `weight`: of the translation in query fusion."""
    page, shown = Page(finder, weight), {code: LANGUAGES[code] for code in finder.languages}
    first = next(iter(shown))
    kinds = [PICTURES, *([CLIPS] if finder.clips else []), OWN]
    accepted = {"file_types": list(IMAGE_SUFFIXES), "show_label": False}
    # by default what is asked while an answer is under way would be dropped
    common = {"api_visibility": "private", "trigger_mode": "always_last"}

    with gr.Blocks(title="Search pictures in your language", delete_cache=(MAX_AGE // 5, MAX_AGE)) as demo:
        query, own = gr.State(None, time_to_live=3600), gr.State(None, time_to_live=3600)
        *others, last = (language.english for language in shown.values())
        names = f"{', '.join(others)} or {last}"
        gr.HTML(
            f"<h1>Search pictures in your language</h1><p>Ask in {names}, or with a picture. The model learned from "
            "English captions and their machine translation alone, noise and all.</p>",
            elem_id="head",
            apply_default_css=False,
        )
        box = gr.MultimodalTextbox(
            {"text": LANGUAGES[first].examples[0], "files": []},
            sources=["upload"],
            placeholder="What would you like to see?",
            max_lines=3,
            submit_btn="Search",
            elem_id="box",
            max_plain_text_length=10_000,
            **accepted,
        )
        with gr.Row(elem_id="options"):
            languages = [(language.name, code) for code, language in shown.items()]
            language = gr.Radio(
                languages, value=first, label="Language", show_label=False, container=False, min_width=180, scale=0
            )
            where = gr.Radio(
                kinds, value=PICTURES, label="Search in", show_label=False, container=False, min_width=260, scale=0
            )
            unseen = gr.Checkbox(label="Only what training never saw", container=False, min_width=200, scale=0)
        examples = gr.Dataset(
            components=["textbox"],
            samples=[[text] for text in LANGUAGES[first].examples],
            show_label=False,
            container=False,
            elem_id="examples",
        )
        problem = gr.HTML(apply_default_css=False)
        with gr.Tabs():
            with gr.Tab("Results"):
                results = gr.HTML(apply_default_css=False, elem_id="results", min_height=300)
            with gr.Tab("Why"):
                why = gr.HTML(apply_default_css=False, elem_id="why", min_height=300)
            with gr.Tab("Translation"):
                noise = gr.HTML(apply_default_css=False, elem_id="noise", min_height=300)
            with gr.Tab("Your own"):
                files = gr.File(file_count="multiple", height=180, elem_id="own", **accepted)
                said = gr.HTML(
                    cards.note(
                        f"Up to {MAX_OWN} pictures of {MAX_BYTES // 2**20} MB each. They are kept in memory "
                        "while this page is open, and searched under “Mine”."
                    ),
                    apply_default_css=False,
                )
                forget = gr.Button("Delete my pictures", size="sm", scale=0)
        gr.HTML(
            "<p>Emoji: Noto Color Emoji (OFL). Stamps: Tux Paint (GPL-2+). Clips: Fluent Emoji (MIT). Names: Unicode "
            "CLDR. The model is small and knows drawn pictures best.</p>",
            elem_id="foot",
            apply_default_css=False,
        )

        state = [query, where, unseen, own]
        ask = {
            "fn": page.ask,
            "inputs": [box, language],
            "outputs": [query, box, problem],
            "show_progress": "hidden",
            **common,
        }

        def show(event):
            """Show the answers first; what explains them follows."""
            event = event.then(page.results, state, results, show_progress="minimal", **common)
            for view, output in ((page.why, why), (page.noise, noise)):
                event = event.then(view, state, output, show_progress="minimal", **common)

        show(box.submit(**ask))
        show(demo.load(**ask))
        chosen = examples.click(
            lambda sample: {"text": sample[0], "files": []}, examples, box, show_progress="hidden", **common
        )
        show(chosen.then(**ask))
        for option in (where, unseen):
            show(option.change(lambda: None, **common))
        show(
            language.change(
                lambda code: gr.update(samples=[[text] for text in LANGUAGES[code].examples]),
                language,
                examples,
                **common,
            ).then(**ask)
        )
        show(files.upload(page.add, [files, own], [own, where, said, files], **common))
        forget.click(lambda: (None, PICTURES, cards.note("Deleted.")), None, [own, where, said], **common)
    return demo


def spoken(model: Path, settings: dict) -> list[str]:
    """Return English and the languages that the model has learned, as far as this page knows them."""
    added = json.loads((model / "config.json").read_text(encoding="utf-8")).get("languages")
    learned = {"en", *(added or [settings.get("language", "gl")])}
    found = [code for code in LANGUAGES if code in learned]
    return found if len(found) > 1 else list(dict.fromkeys([next(iter(LANGUAGES)), *found]))


def serve(folder: Path):
    """Serve a folder that `build_space` wrote, until the process is stopped."""
    metrics = folder / "model/metrics.json"
    settings = json.loads(metrics.read_text(encoding="utf-8"))["settings"] if metrics.exists() else {}
    os.environ.setdefault("GRADIO_TEMP_DIR", tempfile.mkdtemp(prefix="uploads-"))  # of this page alone
    gr.set_static_paths([folder / "clips"])
    build(Finder(folder, spoken(folder / "model", settings)), settings.get("translation_weight", 0.5)).launch(
        theme=THEME,
        css_paths=folder / "style.css",
        max_file_size=MAX_BYTES,
        footer_links=["gradio"],
        run_history=False,
        state_session_capacity=1000,
        app_kwargs={"middleware": [Middleware(UploadLimit, folder=get_upload_folder())]},
    )
