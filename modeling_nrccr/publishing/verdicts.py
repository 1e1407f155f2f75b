"""What a report says of a language, in words."""

USE, USE_FUSED, ASK, TOO_FEW, DO_NOT = (
    "use",
    "use fused",
    "ask the translation",
    "too few queries to say",
    "do not use",
)

# of a language that was taught beside its source language: whether that is to be asked without it
NO_LANGUAGE, GIVE_LANGUAGE = (
    "no language need be given",
    "give the language with each query, none with English",
)


STERN = (DO_NOT, TOO_FEW, ASK, USE_FUSED, USE)  # the sternest first
