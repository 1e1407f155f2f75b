"""Names of languages."""

# those that the engines of Debian have; langcodes has names only with another package of 5 MB
LANGUAGES = dict(
    entry.split(" ", 1)
    for entry in (
        "af Afrikaans, an Aragonese, ar Arabic, ast Asturian, be Belarusian, bg Bulgarian, br Breton, ca Catalan, "
        "ckb Central Kurdish, cs Czech, cy Welsh, da Danish, de German, el Greek, en English, eo Esperanto, "
        "es Spanish, eu Basque, fi Finnish, fr French, frp Arpitan, ga Irish, gd Scottish Gaelic, gl Galician, "
        "hi Hindi, hr Croatian, hu Hungarian, id Indonesian, is Icelandic, it Italian, ja Japanese, kha Khasi, "
        "ku Kurdish, la Latin, lt Lithuanian, mk Macedonian, ms Malay, nb Norwegian Bokmål, nl Dutch, "
        "nn Norwegian Nynorsk, no Norwegian, oc Occitan, pl Polish, pt Portuguese, ro Romanian, rom Romany, "
        "ru Russian, sa Sanskrit, sc Sardinian, sk Slovak, sl Slovenian, sr Serbian, sr-Latn Serbo-Croatian, "
        "sv Swedish, sw Swahili, szl Silesian, tr Turkish, uk Ukrainian, ur Urdu, wo Wolof, zh Chinese"
    ).split(", ")
)


def language_name(code: str) -> str:
    """Return the English name of a language, or the code where none is known here."""
    return LANGUAGES.get(code, code)
