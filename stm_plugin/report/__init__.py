"""`stm report`: one page of HTML that shows what is masked and what other thresholds would mask."""
