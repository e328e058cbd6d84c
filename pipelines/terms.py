"""`TERMS`: whose rain a model that ships may learn from, and on which terms."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Terms:
    """What the rain of an event is, and on which terms a model may be made of it and passed on."""

    event: str  # as in configs/events/open.yaml
    rain: str
    source: str  # to be named with whatever is made of it
    licence: str


TERMS = (
    Terms(
        "fmi",
        "composite of Finland, 1 km, 5 min, 2017-05-09",
        "Finnish Meteorological Institute",
        "open data, CC BY 4.0",
    ),
    Terms(
        "mch2015",
        "composite of Switzerland (AQC), 1 km, 5 min, 2015-05-15",
        "MeteoSwiss",
        "open data since 2025",
    ),
    Terms(
        "mch2017",
        "composite of Switzerland (AQC), 1 km, 5 min, 2017-01-31",
        "MeteoSwiss",
        "open data since 2025",
    ),
    Terms(
        "knmi",
        "composite of the Netherlands (RAD_NL25_RAP), 1 km, 5 min, 2010-08-26",
        "Royal Netherlands Meteorological Institute (KNMI)",
        "open data, CC BY 4.0",
    ),
    Terms(
        "knmi_mfbs",
        "gauge-adjusted composite of the Netherlands (RAD_NL25_RAC_MFBS), 1 km, 5 min, 2011-09-10",
        "Royal Netherlands Meteorological Institute (KNMI)",
        "open data; the files: no limits of access or use",
    ),
    Terms(
        "odyssey",
        "OPERA ODYSSEY composite of Europe, 2 km, 15 min, 2018-08-24",
        "EUMETNET OPERA",
        "terms of EUMETNET; its open composites are CC BY 4.0, and this one is older than that",
    ),
    Terms(
        "mrms",
        "MRMS PrecipRate of the United States, 0.01 degrees, 2 min, 2019-06-10",
        "NOAA National Severe Storms Laboratory",
        "public domain",
    ),
    Terms(
        "openrainer",
        "OpenRainER, Emilia-Romagna, 1 km, 15 min, 2022-09-17 (doi 10.5281/zenodo.10593848)",
        "Arpae-SIMC",
        "CC BY 4.0",
    ),
    Terms(
        "smhi",
        "OpenMRG v1.1, Gothenburg, 2 km, 5 min, 2015-07-25 and 2015-08-27 (doi 10.5281/zenodo.6673750)",
        "Swedish Meteorological and Hydrological Institute (SMHI)",
        "CC BY-SA 4.0",
    ),
)
