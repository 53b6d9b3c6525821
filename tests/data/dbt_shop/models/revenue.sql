select customer, sum(total) as revenue from {{ ref('good') }} group by 1
