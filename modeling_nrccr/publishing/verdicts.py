"""What a report says of a language, in words."""

USE, USE_FUSED, ASK, TOO_FEW, DO_NOT = (
    "use",
    "use fused",
    "ask the translation",
    "too few queries to say",
    "do not use",
)


STERN = (DO_NOT, TOO_FEW, ASK, USE_FUSED, USE)  # the sternest first
