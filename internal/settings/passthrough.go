// This file holds the groups of settings of sni_passthrough.

package settings

import (
	"fmt"
	"math"
	"net"
	"slices"
	"strings"
	"time"

	"github.com/caddyserver/caddy/v2"

	"github.com/holdfast-proxy/caddy-holdfast/internal/tunnel"
)

// Defaults of passthrough.
const (
	PassthroughDialTimeout = 10 * time.Second
	InactivityTimeout      = 4 * time.Hour
	InactivityMultiplier   = 6
	InactivityGrace        = 10 * time.Minute
	HalfOpenTimeout        = 5 * time.Minute
	TCPKeepAliveIdle       = time.Minute
	TCPKeepAliveInterval   = 15 * time.Second
	TCPKeepAliveCount      = 4
)

// maxLifetimes are the defaults of max_lifetime; an immortal tunnel has none.
var maxLifetimes = map[tunnel.Treatment]time.Duration{
	tunnel.Standard: 24 * time.Hour,
	tunnel.Extended: 7 * 24 * time.Hour,
}

// PassthroughTransport has the settings of connecting to an upstream that gets
// bytes as they come.
type PassthroughTransport struct {
	// How long a TCP connect may take, before the next upstream is tried. It must be
	// positive.
	// Default: `10s`.
	DialTimeout *caddy.Duration `json:"dial_timeout,omitempty"`

	// The version of the PROXY protocol with whose header each connection to an
	// upstream begins: `v1` or `v2`. It says who the client is; v2 also which server
	// name the client asked for, and the first of the protocols (ALPN) that it offered.
	// Default: no header.
	ProxyProtocol string `json:"proxy_protocol,omitempty"`
}

// PassthroughKeepAlive has the settings of live tunnels.
type PassthroughKeepAlive struct {
	// What happens to a tunnel without traffic. `standard`: it is closed after
	// inactivity_timeout; `extended`: after that times inactivity_multiplier;
	// `immortal`: neither inactivity nor age ends it.
	// Default: `extended`.
	Treatment string `json:"treatment,omitempty"`

	// How long a tunnel may go without a byte either way before it is logged that it
	// is going to be closed. It must be positive.
	// Default: `4h`.
	InactivityTimeout *caddy.Duration `json:"inactivity_timeout,omitempty"`

	// By what that is multiplied for extended tunnels. At least 1.
	// Default: `6`.
	InactivityMultiplier *float64 `json:"inactivity_multiplier,omitempty"`

	// How long after that a tunnel is closed, and up to 10 % later at random, unless
	// bytes flow. Zero: at once.
	// Default: `10m`.
	InactivityGrace *caddy.Duration `json:"inactivity_grace,omitempty"`

	// How long a tunnel may live; shortened by up to 10 % at random. Immortal ones
	// have no limit. Zero: for ever.
	// Default: `24h` for standard, `168h` for extended.
	MaxLifetime *caddy.Duration `json:"max_lifetime,omitempty"`

	// How long a tunnel goes on after one side has ended. It must be positive.
	// Default: `5m`.
	HalfOpenTimeout *caddy.Duration `json:"half_open_timeout,omitempty"`

	// How long bytes of the client may stay without one of the backend after them.
	// Zero: for ever.
	// Default: `0`.
	StuckTimeout *caddy.Duration `json:"stuck_timeout,omitempty"`

	// When the kernel asks peers that say nothing whether they are there.
	TCPKeepAlive *TCPKeepAlive `json:"tcp_keepalive,omitempty"`

	// How long sent bytes may stay without an acknowledgement, or unsent because the
	// peer does not read: also a live peer is cut then. It overrides the keep-alive's
	// count. Linux only. Zero: as long as the system allows.
	// Default: `0`.
	TCPUserTimeout *caddy.Duration `json:"tcp_user_timeout,omitempty"`
}

// TCPKeepAlive has the settings of TCP keep-alive, on both legs.
type TCPKeepAlive struct {
	// How long a peer may say nothing before it is asked; in seconds, rounded up.
	// Zero turns keep-alive off.
	// Default: `60s`.
	Idle *caddy.Duration `json:"idle,omitempty"`

	// How long to wait before it is asked again; likewise. It must be positive.
	// Default: `15s`.
	Interval *caddy.Duration `json:"interval,omitempty"`

	// How often it is asked in vain before it is taken for dead, 1 to 127.
	// Default: `4`.
	Count *int `json:"count,omitempty"`
}

// PassthroughLimits has the bounds of a route's connections. A client that is
// refused is closed.
type PassthroughLimits struct {
	// How many connections the route may have at once. Zero: any number, and what
	// connection_registry allows in all does not count for them.
	// Default: as many as connection_registry allows.
	MaxConnections *int `json:"max_connections,omitempty"`

	// How many of them one client IP may have. Zero: any number, and what
	// connection_registry allows an IP does not count for them.
	// Default: as many as connection_registry allows.
	MaxConnectionsPerIP *int `json:"max_connections_per_ip,omitempty"`

	// How many connections each upstream may have; it gets no more. Zero: any number.
	// Default: `0`.
	PerUpstream *int `json:"upstream_max_connections,omitempty"`
}

// Tunnel returns the settings of live tunnels, with the defaults filled in; nil is
// all defaults.
func (k *PassthroughKeepAlive) Tunnel() (*tunnel.Settings, error) {
	own := orZero(k)
	treatment := tunnel.Extended
	if own.Treatment != "" {
		var err error
		if treatment, err = tunnel.ParseTreatment(own.Treatment); err != nil {
			return nil, fmt.Errorf("unknown keep_alive_treatment %q: want standard, extended or immortal", own.Treatment)
		}
	}
	return &tunnel.Settings{
		Treatment:            treatment,
		InactivityTimeout:    DurationOr(own.InactivityTimeout, InactivityTimeout),
		InactivityMultiplier: ValueOr(own.InactivityMultiplier, InactivityMultiplier),
		InactivityGrace:      DurationOr(own.InactivityGrace, InactivityGrace),
		MaxLifetime:          DurationOr(own.MaxLifetime, maxLifetimes[treatment]),
		HalfOpenTimeout:      DurationOr(own.HalfOpenTimeout, HalfOpenTimeout),
		StuckTimeout:         DurationOr(own.StuckTimeout, 0),
		Sockets: tunnel.SocketOptions{
			KeepAlive:   own.TCPKeepAlive.config(),
			UserTimeout: DurationOr(own.TCPUserTimeout, 0),
		},
	}, nil
}

// config is what the net package takes; nil is all defaults.
func (k *TCPKeepAlive) config() net.KeepAliveConfig {
	own := orZero(k)
	idle := DurationOr(own.Idle, TCPKeepAliveIdle)
	if idle == 0 {
		return net.KeepAliveConfig{}
	}
	return net.KeepAliveConfig{
		Enable:   true,
		Idle:     idle,
		Interval: DurationOr(own.Interval, TCPKeepAliveInterval),
		Count:    ValueOr(own.Count, TCPKeepAliveCount),
	}
}

// Check refuses values that mean nothing; the error names the setting.
func (k *PassthroughKeepAlive) Check() error {
	own := orZero(k)
	if f := ValueOr(own.InactivityMultiplier, 1); !(f >= 1) || math.IsInf(f, 0) { // also if it is no number
		return fmt.Errorf("inactivity_multiplier must be at least 1: %v", f)
	}
	err := First(
		Positive("inactivity_timeout", own.InactivityTimeout), NotNegative("inactivity_grace", own.InactivityGrace),
		NotNegative("max_lifetime", own.MaxLifetime), Positive("half_open_timeout", own.HalfOpenTimeout),
		NotNegative("stuck_timeout", own.StuckTimeout), NotNegative("tcp_user_timeout", own.TCPUserTimeout),
		own.TCPKeepAlive.check(),
	)
	if err != nil {
		return err
	}
	_, err = k.Tunnel() // the treatment
	return err
}

// maxTCPKeepAlive and maxTCPKeepAliveCount are what Linux takes.
const (
	maxTCPKeepAlive      = 32767 * time.Second
	maxTCPKeepAliveCount = 127
)

func (k *TCPKeepAlive) check() error {
	own := orZero(k)
	err := First(
		NotNegative("tcp_keepalive", own.Idle), Positive("tcp_keepalive", own.Interval), CheckCount("tcp_keepalive", own.Count, 1),
	)
	if err != nil {
		return err
	}
	if ValueOr(own.Idle, 1) == 0 && (own.Interval != nil || own.Count != nil) {
		return fmt.Errorf("tcp_keepalive is off, and can have no interval and no count")
	}
	for _, d := range []*caddy.Duration{own.Idle, own.Interval} {
		if DurationOr(d, 0) > maxTCPKeepAlive {
			return fmt.Errorf("tcp_keepalive must be at most %s: %s", maxTCPKeepAlive, time.Duration(*d))
		}
	}
	if n := ValueOr(own.Count, 1); n > maxTCPKeepAliveCount {
		return fmt.Errorf("tcp_keepalive: the count must be at most %d: %d", maxTCPKeepAliveCount, n)
	}
	return nil
}

// Check refuses values that mean nothing; the error names the setting.
func (l *PassthroughLimits) Check() error {
	own := orZero(l)
	return First(
		CheckCount("max_connections", own.MaxConnections, 0), CheckCount("max_connections_per_ip", own.MaxConnectionsPerIP, 0),
		CheckCount("upstream_max_connections", own.PerUpstream, 0),
	)
}

// WebSocketOnly reports whether a passthrough has no use for a subdirective of
// websocket_proxy.
func WebSocketOnly(name string) bool {
	return slices.Contains(webSocketOnly, name) || strings.HasPrefix(name, "tls")
}

// webSocketOnly are those subdirectives, beside those about TLS.
var webSocketOnly = []string{
	"allowed_origins", "client_max_message_size", "compression", "default_origin", "drain_window", "dynamic",
	"first_data_timeout", "handshake_timeout", "header_down", "header_up", "health_http", "health_ws", "idle_timeout",
	"migrate_on_unhealthy", "ping_interval", "ping_timeout", "replay", "replay_buffer", "replay_overflow",
	"resume_concurrency", "resume_interval", "resume_limit", "resume_on", "resume_timeout", "server_max_message_size",
	"unhealthy_latency", "write_timeout",
}
