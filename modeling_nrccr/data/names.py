"""Names of languages."""

LANGUAGES = {
    "ca": "Catalan",
    "cs": "Czech",
    "de": "German",
    "en": "English",
    "eo": "Esperanto",
    "es": "Spanish",
    "fr": "French",
    "gl": "Galician",
}


def language_name(code: str) -> str:
    return LANGUAGES.get(code, code)
