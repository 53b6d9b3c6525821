select 1 as id, sum(revenue) as total from {{ ref('revenue') }}
