{{ config(materialized='anton_table', unique_key='code') }}
select c.code, c.country, coalesce(sum(o.total), 0) as revenue
from {{ ref('countries') }} c left join {{ ref('orders_paid') }} o on o.country = c.code
group by c.code, c.country
