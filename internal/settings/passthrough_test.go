package settings_test

import (
	"net"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"

	"github.com/holdfast-proxy/caddy-holdfast/internal/settings"
	"github.com/holdfast-proxy/caddy-holdfast/internal/tunnel"
)

// What is unset has the default of the treatment; zero is not unset.
func TestTunnelSettings(t *testing.T) {
	defaults := func(change func(*tunnel.Settings)) tunnel.Settings {
		s := tunnel.Settings{
			Treatment: tunnel.Extended, InactivityTimeout: 4 * time.Hour, InactivityMultiplier: 6, InactivityGrace: 10 * time.Minute,
			MaxLifetime: 168 * time.Hour, HalfOpenTimeout: 5 * time.Minute,
			Sockets: tunnel.SocketOptions{KeepAlive: net.KeepAliveConfig{Enable: true, Idle: time.Minute, Interval: 15 * time.Second, Count: 4}},
		}
		change(&s)
		return s
	}
	for name, tt := range map[string]struct {
		keepAlive *settings.PassthroughKeepAlive
		want      tunnel.Settings
	}{
		"nothing":  {nil, defaults(func(*tunnel.Settings) {})},
		"empty":    {&settings.PassthroughKeepAlive{TCPKeepAlive: new(settings.TCPKeepAlive)}, defaults(func(*tunnel.Settings) {})},
		"standard": {&settings.PassthroughKeepAlive{Treatment: "standard"}, defaults(func(s *tunnel.Settings) { s.Treatment, s.MaxLifetime = tunnel.Standard, 24*time.Hour })},
		"immortal": {&settings.PassthroughKeepAlive{Treatment: "immortal"}, defaults(func(s *tunnel.Settings) { s.Treatment, s.MaxLifetime = tunnel.Immortal, 0 })},
		"zero": {
			&settings.PassthroughKeepAlive{InactivityGrace: new(caddy.Duration), MaxLifetime: new(caddy.Duration), TCPKeepAlive: &settings.TCPKeepAlive{Idle: new(caddy.Duration)}},
			defaults(func(s *tunnel.Settings) {
				s.InactivityGrace, s.MaxLifetime, s.Sockets = 0, 0, tunnel.SocketOptions{}
			}),
		},
		"all": {
			&settings.PassthroughKeepAlive{
				InactivityTimeout: new(caddy.Duration(1)), InactivityMultiplier: new(2.5), InactivityGrace: new(caddy.Duration(3)),
				MaxLifetime: new(caddy.Duration(4)), HalfOpenTimeout: new(caddy.Duration(5)), StuckTimeout: new(caddy.Duration(6)),
				TCPKeepAlive:   &settings.TCPKeepAlive{Idle: new(caddy.Duration(7)), Interval: new(caddy.Duration(8)), Count: new(9)},
				TCPUserTimeout: new(caddy.Duration(10)),
			},
			tunnel.Settings{
				Treatment: tunnel.Extended, InactivityTimeout: 1, InactivityMultiplier: 2.5, InactivityGrace: 3, MaxLifetime: 4, HalfOpenTimeout: 5, StuckTimeout: 6,
				Sockets: tunnel.SocketOptions{KeepAlive: net.KeepAliveConfig{Enable: true, Idle: 7, Interval: 8, Count: 9}, UserTimeout: 10},
			},
		},
	} {
		if err := tt.keepAlive.Check(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if got, err := tt.keepAlive.Tunnel(); err != nil || *got != tt.want {
			t.Errorf("%s: got %+v, %v; want %+v", name, got, err, tt.want)
		}
	}
}
