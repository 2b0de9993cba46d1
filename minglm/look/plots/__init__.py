"""Pictures of routing, training, attention and any array. Plain arrays in, a Matplotlib figure out:
`figure.savefig("load.png")`.

Figures are made without pyplot, so nothing global changes and nothing has to be closed. Colour never stands alone:
maps go evenly from light to dark, and numbers are printed where they fit. The numbers behind the figures come from
`look.routing`, `look.specialisation` and `look.rows`. `layers` are always the numbers of all layers, for labels;
`layer` is a place along the layer axis.
"""

from minglm.look.curves import plot_seeds, plot_training
from minglm.look.plots.arrays import plot_array, plot_attention
from minglm.look.plots.drafts import plot_acceptance, plot_overlap
from minglm.look.plots.figure import LOAD_COLOURS, Picture
from minglm.look.plots.load import plot_bars, plot_drops, plot_load, plot_load_over_training
from minglm.look.plots.pairs import plot_coactivation, plot_paths
from minglm.look.plots.roofline import plot_roofline
from minglm.look.plots.router import plot_confidence, plot_picks, plot_selection
from minglm.look.plots.specialisation import plot_domains, plot_removal, plot_vocabulary
from minglm.look.plots.training import plot_saturation

__all__ = [
    "LOAD_COLOURS",
    "Picture",
    "plot_acceptance",
    "plot_array",
    "plot_attention",
    "plot_bars",
    "plot_coactivation",
    "plot_confidence",
    "plot_domains",
    "plot_drops",
    "plot_load",
    "plot_load_over_training",
    "plot_overlap",
    "plot_paths",
    "plot_picks",
    "plot_removal",
    "plot_roofline",
    "plot_saturation",
    "plot_seeds",
    "plot_selection",
    "plot_training",
    "plot_vocabulary",
]
