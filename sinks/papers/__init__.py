"""Papers: the JSON of a document or statement rendered for others: UBL, PDF, CSV, Odoo.  They add no facts."""
