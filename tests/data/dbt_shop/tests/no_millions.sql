select * from {{ ref('revenue') }} where revenue > 1000000
