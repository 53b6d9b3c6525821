select customer, count(*) as orders, sum(total) as revenue
from {{ source('app', 'orders') }}
group by customer
