"""Parts of the figure of a run that users plot on axes of their own."""

import numpy as np
from matplotlib.figure import Figure

from lsgd_jax.figures.run import draw_members


def test_members_fill_their_rows_from_an_exchange_to_the_next():
    axes, members = Figure().add_subplot(), np.array([[True, False, True], [False, False, True]])
    draw_members(axes, np.array([4, 12]), members)
    [mesh] = axes.collections
    np.testing.assert_array_equal(~np.ma.getmaskarray(mesh.get_array()).reshape(3, 2), members.T)
    edges = mesh.get_coordinates()  # [row, column, (x, y)]
    np.testing.assert_array_equal(edges[0, :, 0], [4, 12, 20])
    np.testing.assert_array_equal(edges[:, 0, 1], [-0.5, 0.5, 1.5, 2.5])
