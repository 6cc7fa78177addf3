"""Experiments: arms that are trained and measured one after another, and the tables of them (`stm experiment`)."""
