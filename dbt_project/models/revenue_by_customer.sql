{{ config(materialized='table', contract={'enforced': true}) }}
select customer, count(*)::integer as orders, sum(total)::numeric as revenue from {{ ref('orders_paid') }} group by customer
