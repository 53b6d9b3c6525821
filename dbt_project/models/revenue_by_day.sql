{{ config(materialized='incremental', unique_key='day') }}
select placed_at::date as day, count(*) as orders, sum(total) as revenue from {{ ref('orders_paid') }}
{% if is_incremental() %} where placed_at::date >= (select max(day) from {{ this }}) {% endif %}
group by 1
