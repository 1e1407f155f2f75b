"""Which languages there are engines for in Debian, without asking one."""

from collections import defaultdict

from .language_codes import standard_code


# Packages are named by their two languages: apertium-en-gl, which may have one direction alone.
APERTIUM = (
    "afr-nld arg-cat bel-rus br-fr cat-ita cat-srd en-gl eng-cat eng-spa eo-ca eo-en eo-es eo-fr es-gl es-pt "
    "es-ro eu-en eu-es fr-es fra-cat fra-frp hbs-eng hbs-mkd hbs-slv ind-zlm isl-eng isl-swe mkd-bul mkd-eng "
    "nno-nob oc-ca oc-es oci-fra pol-szl por-cat pt-gl rus-ukr spa-arg spa-ast spa-cat spa-ita srd-ita swe-dan "
    "urd-hin"
).split()
# dict-freedict-eng-ces, which is read both ways
FREEDICT = (
    "afr-deu afr-eng ara-eng bre-fra ces-eng ckb-kmr cym-eng dan-eng deu-bul deu-ell deu-eng deu-fin deu-fra "
    "deu-ind deu-ita deu-kur deu-nld deu-pol deu-por deu-rus deu-spa deu-swe deu-tur ell-bul ell-eng ell-fin "
    "ell-fra ell-ind ell-ita ell-jpn ell-lat ell-lit ell-nld ell-nor ell-pol ell-por ell-rus ell-spa ell-swe "
    "eng-afr eng-ara eng-bul eng-ces eng-cym eng-dan eng-deu eng-ell eng-fin eng-fra eng-gle eng-hin eng-hrv "
    "eng-hun eng-ind eng-ita eng-jpn eng-lat eng-lit eng-nld eng-nor eng-pol eng-por eng-rom eng-rus eng-spa "
    "eng-srp eng-swe eng-swh eng-tur epo-eng fin-bul fin-deu fin-ell fin-eng fin-fra fin-ind fin-ita fin-jpn "
    "fin-lat fin-lit fin-nld fin-nor fin-pol fin-por fin-swe fra-bre fra-bul fra-deu fra-ell fra-eng fra-fin "
    "fra-ita fra-jpn fra-lat fra-lit fra-nld fra-pol fra-por fra-rus fra-spa fra-swe fra-tur gla-deu gle-eng "
    "gle-pol hrv-eng hun-eng isl-eng ita-bul ita-deu ita-ell ita-eng ita-fin ita-ind ita-jpn ita-lit ita-nor "
    "ita-pol ita-por ita-rus ita-spa ita-swe ita-tur jpn-deu jpn-eng jpn-fra jpn-rus kha-deu kha-eng kur-deu "
    "kur-eng kur-tur lat-deu lat-eng lit-eng mkd-bul nld-bul nld-deu nld-ell nld-eng nld-fin nld-fra nld-ind "
    "nld-ita nld-lat nld-lit nld-pol nld-por nld-rus nld-spa nld-swe nno-nob oci-cat pol-bul pol-deu pol-ell "
    "pol-eng pol-fin pol-fra pol-gle pol-ind pol-ita pol-jpn pol-nld pol-nor pol-por pol-rus pol-spa pol-swe "
    "pol-tur por-deu por-eng por-fra por-spa san-deu slk-eng slv-eng spa-ast spa-deu spa-eng spa-por srp-eng "
    "swe-bul swe-deu swe-ell swe-eng swe-fin swe-fra swe-ita swe-jpn swe-lat swe-nld swe-nor swe-pol swe-por "
    "swe-rus swe-spa swe-tur swh-eng swh-pol tur-deu tur-eng wol-fra"
).split()


def languages() -> dict[str, dict[str, list[str]]]:
    """Return, for each language by its ISO 639-1 code, engines and the languages that they pair it with."""
    found = defaultdict(lambda: defaultdict(set))
    for engine, pairs in (("apertium", APERTIUM), ("dictionary", FREEDICT)):
        for pair in pairs:
            one, other = map(standard_code, pair.split("-"))
            found[one][engine].add(other)
            found[other][engine].add(one)
    return {
        code: {engine: sorted(others) for engine, others in engines.items()} for code, engines in sorted(found.items())
    }
