"""Side-by-side measurements. Each script writes results/NAME.json; make_table.py shows them."""
