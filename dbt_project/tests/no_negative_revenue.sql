select customer from {{ ref('revenue_by_customer') }} where revenue < 0
