# SPDX-License-Identifier: Apache-2.0
"""The doctor: what is wrong with a data set, found before it trains.

`loading` makes findings of what loaders say; `objects` and `splits` look at annotations, the quick part, which every
training runs; `pictures` looks at pixels. `report` puts them together, `page` draws. All kinds of findings are in
`findings`.
"""
