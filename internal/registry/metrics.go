package registry

import "github.com/prometheus/client_golang/prometheus"

// metrics are the registry's collectors, made once. Their methods are named for
// what happened.
type metrics struct {
	active        *prometheus.GaugeVec
	openedTotal   *prometheus.CounterVec
	closedTotal   *prometheus.CounterVec
	bytesTotal    *prometheus.CounterVec
	messagesTotal *prometheus.CounterVec
	duration      *prometheus.HistogramVec
}

const (
	namespace = "caddy"
	subsystem = "connections"
)

// ageBuckets are the bounds, in seconds, of the durations in metrics and of the
// ages in Stats: connections live from moments to weeks.
var ageBuckets = []float64{1, 10, 60, 300, 1800, 3600, 14400, 86400, 604800}

func newMetrics() *metrics {
	counter := func(name, help string, labels ...string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{
			Namespace: namespace, Subsystem: subsystem, Name: name, Help: help,
		}, labels)
	}
	return &metrics{
		active: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Namespace: namespace, Subsystem: subsystem, Name: "active",
			Help: "Connections that exist now.",
		}, []string{"kind", "route", "state"}),
		openedTotal:   counter("opened_total", "Connections that were opened.", "kind", "route"),
		closedTotal:   counter("closed_total", "Connections that had been opened and ended.", "kind", "route", "reason"),
		bytesTotal:    counter("bytes_total", "Payload bytes of data, in: from clients.", "kind", "route", "direction"),
		messagesTotal: counter("messages_total", "Complete WebSocket messages, in: from clients.", "route", "direction"),
		duration: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Namespace: namespace, Subsystem: subsystem, Name: "duration_seconds",
			Help:    "Life of connections that ended, from their opening.",
			Buckets: ageBuckets,
		}, []string{"kind", "route"}),
	}
}

func (m *metrics) collectors() []prometheus.Collector {
	return []prometheus.Collector{m.active, m.openedTotal, m.closedTotal, m.bytesTotal, m.messagesTotal, m.duration}
}

// bind makes the series of a route that are counted on the path of every
// message, so that counting needs no lookup.
func (m *metrics) bind(t *Route) {
	for _, d := range []Direction{In, Out} {
		t.bytes[d] = m.bytesTotal.WithLabelValues(string(t.key.kind), t.key.name, d.String())
		t.messages[d] = m.messagesTotal.WithLabelValues(t.key.name, d.String())
	}
}

// forget deletes the series of a route that is gone.
func (m *metrics) forget(t *Route) {
	labels := prometheus.Labels{"kind": string(t.key.kind), "route": t.key.name}
	m.active.DeletePartialMatch(labels)
	m.openedTotal.DeletePartialMatch(labels)
	m.closedTotal.DeletePartialMatch(labels)
	m.bytesTotal.DeletePartialMatch(labels)
	m.duration.DeletePartialMatch(labels)
	m.messagesTotal.DeletePartialMatch(prometheus.Labels{"route": t.key.name})
}

func (m *metrics) admitted(c *Conn) { m.gauge(c, c.state).Inc() }

func (m *metrics) moved(c *Conn, from, to State) {
	m.gauge(c, from).Dec()
	if to != Closed {
		m.gauge(c, to).Inc()
	}
}

func (m *metrics) opened(c *Conn) {
	m.openedTotal.WithLabelValues(string(c.info.Kind), c.route.key.name).Inc()
}

func (m *metrics) closed(c *Conn) {
	kind, route := string(c.info.Kind), c.route.key.name
	m.closedTotal.WithLabelValues(kind, route, string(c.ending.Reason)).Inc()
	m.duration.WithLabelValues(kind, route).Observe(c.since.Sub(c.openedAt).Seconds())
}

func (m *metrics) gauge(c *Conn, s State) prometheus.Gauge {
	return m.active.WithLabelValues(string(c.info.Kind), c.route.key.name, s.String())
}
