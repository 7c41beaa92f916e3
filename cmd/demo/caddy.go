// This file runs Caddy inside the demo: the addresses it gets, its Caddyfile.
package main

import (
	"bytes"
	_ "embed"
	"fmt"
	"net"
	"os"
	"strconv"
	"text/template"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	_ "github.com/caddyserver/caddy/v2/modules/standard"

	_ "github.com/holdfast-proxy/caddy-holdfast"
)

//go:embed Caddyfile.tmpl
var caddyfileSource string

var caddyfile = template.Must(template.New("Caddyfile").Option("missingkey=error").Parse(caddyfileSource))

// demoConfig is what Caddyfile.tmpl is filled with. Addresses are host:port.
type demoConfig struct {
	Listen   string   // of the site
	Admin    string   // of the admin API
	Backends []string // of the WebSocket backends
	Front    string   // of the page
	Storage  string   // a directory, so that the user's own Caddy is left alone
}

// Bind is the host that the site listens on.
func (c *demoConfig) Bind() string {
	host, _, _ := net.SplitHostPort(c.Listen)
	return host
}

// Sites are the addresses that the site answers to. On loopback these are
// only loopback's names, lest a foreign page reach the demo by a name of its
// own that resolves to 127.0.0.1; on other interfaces, any name.
func (c *demoConfig) Sites() []string {
	host, port, _ := net.SplitHostPort(c.Listen)
	if ip := net.ParseIP(host); ip != nil && ip.IsLoopback() {
		return []string{"http://" + c.Listen, "http://localhost:" + port}
	}
	return []string{"http://:" + port}
}

// URL is where a browser on this machine finds the page.
func (c *demoConfig) URL() string {
	return "http://" + local(c.Listen)
}

// API is where Caddy finds its own admin API.
func (c *demoConfig) API() string {
	return local(c.Admin)
}

// local is addr, or loopback if addr means every interface.
func local(addr string) string {
	host, port, err := net.SplitHostPort(addr)
	if ip := net.ParseIP(host); err == nil && ip != nil && ip.IsUnspecified() {
		return net.JoinHostPort("127.0.0.1", port)
	}
	return addr
}

// reserve takes the address that a flag names, or a free port for port 0. A
// bare port means 127.0.0.1. Caddy itself would not notice a port in use: it
// shares ports (SO_REUSEPORT) with whichever server allows that.
func reserve(flag, addr string) (net.Listener, error) {
	if _, err := strconv.ParseUint(addr, 10, 16); err == nil {
		addr = net.JoinHostPort("127.0.0.1", addr)
	}
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("%s %s cannot be used: %w\nname another address, or port 0 for a free one: %s 127.0.0.1:0",
			flag, addr, err, flag)
	}
	return ln, nil
}

// startCaddy runs Caddy in this process.
func startCaddy(config *demoConfig) error {
	var text bytes.Buffer
	if err := caddyfile.Execute(&text, config); err != nil {
		return fmt.Errorf("filling in the Caddyfile: %w", err)
	}
	adapted, warnings, err := caddyconfig.GetAdapter("caddyfile").Adapt(text.Bytes(), nil)
	if err != nil {
		return fmt.Errorf("adapting the Caddyfile: %w", err)
	}
	for _, w := range warnings {
		fmt.Fprintln(os.Stderr, "demo: Caddyfile:", w.String())
	}
	if err := caddy.Load(adapted, false); err != nil {
		return fmt.Errorf("starting Caddy: %w", err)
	}
	return nil
}
