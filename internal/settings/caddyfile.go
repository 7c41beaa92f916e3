// This file has the groups' Caddyfile syntax.

package settings

import (
	"strconv"

	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"

	"github.com/holdfast-proxy/caddy-holdfast/internal/subdirective"
)

// Words are the group's subdirectives of one argument.
func (t *Transport) Words() map[string]subdirective.Argument {
	return map[string]subdirective.Argument{
		"dial_timeout":      subdirective.Duration{To: &t.DialTimeout},
		"handshake_timeout": subdirective.Duration{To: &t.HandshakeTimeout},
		"proxy_protocol":    subdirective.Word{To: &t.ProxyProtocol},
	}
}

// Words are the group's subdirectives of one argument.
func (k *KeepAlive) Words() map[string]subdirective.Argument {
	return map[string]subdirective.Argument{
		"ping_interval":      subdirective.Duration{To: &k.PingInterval, Off: true},
		"ping_timeout":       subdirective.Duration{To: &k.PingTimeout},
		"idle_timeout":       subdirective.Duration{To: &k.IdleTimeout, Off: true},
		"first_data_timeout": subdirective.Duration{To: &k.FirstDataTimeout, Off: true},
		"max_lifetime":       subdirective.Duration{To: &k.MaxLifetime, Off: true},
		"write_timeout":      subdirective.Duration{To: &k.WriteTimeout, Off: true},
	}
}

// Words are the group's subdirectives of one argument.
func (r *Resume) Words() map[string]subdirective.Argument {
	return map[string]subdirective.Argument{
		"resume_timeout":     subdirective.Duration{To: &r.Timeout, Off: true},
		"resume_concurrency": subdirective.Number{To: &r.Concurrency},
		"resume_limit":       subdirective.Number{To: &r.Limit},
	}
}

// ParseCodes takes close codes.
func (r *Resume) ParseCodes(d *caddyfile.Dispenser) error {
	name, args := d.Val(), d.RemainingArgs()
	codes := make([]uint16, 0, len(args))
	for _, arg := range args {
		code, err := strconv.ParseUint(arg, 10, 16)
		if err != nil {
			return d.Errf("%s: invalid close code %q", name, arg)
		}
		codes = append(codes, uint16(code))
	}
	r.CloseCodes = &codes
	return subdirective.Count(d, name, args, 1, len(args))
}

// Words are the group's subdirectives of one argument.
func (r *Replay) Words() map[string]subdirective.Argument {
	return map[string]subdirective.Argument{
		"replay":          subdirective.Word{To: &r.Mode},
		"replay_buffer":   subdirective.Size{To: &r.Buffer},
		"replay_overflow": subdirective.Word{To: &r.Overflow},
	}
}

// Words are the group's subdirectives of one argument.
func (l *Limits) Words() map[string]subdirective.Argument {
	return map[string]subdirective.Argument{
		"upstream_max_connections": subdirective.Number{To: &l.PerUpstream},
		"max_connections":          subdirective.Number{To: &l.MaxConnections},
		"max_connections_per_ip":   subdirective.Number{To: &l.MaxConnectionsPerIP},
		"client_max_message_size":  subdirective.Size{To: &l.ClientMaxMessageSize},
		"server_max_message_size":  subdirective.Size{To: &l.ServerMaxMessageSize},
	}
}

// Words are the group's subdirectives of one argument.
func (t *PassthroughTransport) Words() map[string]subdirective.Argument {
	return map[string]subdirective.Argument{
		"dial_timeout":   subdirective.Duration{To: &t.DialTimeout},
		"proxy_protocol": subdirective.Word{To: &t.ProxyProtocol},
	}
}

// Words are the group's subdirectives of one argument.
func (k *PassthroughKeepAlive) Words() map[string]subdirective.Argument {
	return map[string]subdirective.Argument{
		"keep_alive_treatment":  subdirective.Word{To: &k.Treatment},
		"inactivity_timeout":    subdirective.Duration{To: &k.InactivityTimeout},
		"inactivity_multiplier": subdirective.Factor{To: &k.InactivityMultiplier},
		"inactivity_grace":      subdirective.Duration{To: &k.InactivityGrace},
		"max_lifetime":          subdirective.Duration{To: &k.MaxLifetime, Off: true},
		"half_open_timeout":     subdirective.Duration{To: &k.HalfOpenTimeout},
		"stuck_timeout":         subdirective.Duration{To: &k.StuckTimeout, Off: true},
		"tcp_user_timeout":      subdirective.Duration{To: &k.TCPUserTimeout, Off: true},
	}
}

// Words are the group's subdirectives of one argument.
func (l *PassthroughLimits) Words() map[string]subdirective.Argument {
	return map[string]subdirective.Argument{
		"upstream_max_connections": subdirective.Number{To: &l.PerUpstream},
		"max_connections":          subdirective.Number{To: &l.MaxConnections},
		"max_connections_per_ip":   subdirective.Number{To: &l.MaxConnectionsPerIP},
	}
}
