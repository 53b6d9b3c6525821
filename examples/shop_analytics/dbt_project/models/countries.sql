select country, sum(total) as revenue
from {{ source('app', 'orders') }}
group by country
